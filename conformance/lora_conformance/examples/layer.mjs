// A LoRA layer in plain JavaScript, without packages. Write its results for
// `python -m lora_conformance compare FOLDER`:
//
//     node layer.mjs FOLDER

import { mkdirSync, readFileSync, writeFileSync } from "node:fs";

// In a copy at another place, write the path of conformance/vectors/ here.
const VECTORS = new URL("../vectors/", import.meta.url);
const CASES = ["lora", "lora-r1-alpha1", "lora-r2-alpha32", "rslora", "dropout"];

// A matrix is an array of rows. A vector is an array of numbers.
const transpose = (a) => a[0].map((_, j) => a.map((row) => row[j]));
const matmul = (a, b) =>
  a.map((row) => b[0].map((_, j) => row.reduce((sum, value, k) => sum + value * b[k][j], 0)));
const map = (f, a, ...others) =>
  a.map((row, i) => row.map((value, j) => f(value, ...others.map((other) => other[i][j]))));

// Return the results by name. To test your layer, call it here.
function layer(settings, t) {
  const { r, alpha, dropout } = settings;
  const s = settings.use_rslora ? alpha / Math.sqrt(r) : alpha / r;
  const keep = map((x, i) => i / (1 - dropout), t.x, t.mask ?? map(() => 1, t.x));
  const h = map((x, k) => x * k, t.x, keep);
  const update = matmul(matmul(h, transpose(t.A)), transpose(t.B));
  const base = matmul(t.x, transpose(t.W)).map((row) => row.map((v, j) => v + t.b[j]));
  const y = map((v, u) => v + s * u, base, update);
  const size = y.length * y[0].length;
  const g = map((v, target) => (2 * (v - target)) / size, y, t.target); // of the mean squared error
  const sgB = map((v) => s * v, matmul(g, t.B));
  const sgT = map((v) => s * v, transpose(g));
  return {
    y,
    dA: matmul(transpose(sgB), h),
    dB: matmul(sgT, matmul(h, transpose(t.A))),
    dx: map((v, u, k) => v + u * k, matmul(g, t.W), matmul(sgB, t.A), keep),
    merged_W: map((w, u) => w + s * u, t.W, matmul(t.B, t.A)),
  };
}

// A safetensors file is the length of the header (8 bytes), the header in JSON, and the data.
function load(file) {
  const bytes = readFileSync(file);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const tensors = {};
  for (const [name, about] of Object.entries(JSON.parse(bytes.subarray(8, start)))) {
    if (name === "__metadata__") continue;
    const [first, end] = about.data_offsets;
    const values = [];
    for (let at = start + first; at < start + end; at += 8) values.push(bytes.readDoubleLE(at));
    tensors[name] = nested(values, about.shape);
  }
  return tensors;
}

// Arrays of any depth: numbers and a shape to arrays, and back.
function nested(values, [count, ...rest]) {
  if (rest.length === 0) return values;
  const size = values.length / count;
  const part = (_, i) => nested(values.slice(i * size, (i + 1) * size), rest);
  return Array.from({ length: count }, part);
}
const shapeOf = (a) => (typeof a === "number" ? [] : [a.length, ...shapeOf(a[0])]);
const flat = (a) => (typeof a === "number" ? [a] : Array.from(a, flat).flat());

function save(file, tensors) {
  const header = {};
  let end = 0;
  for (const [name, tensor] of Object.entries(tensors)) {
    const first = end;
    end += 8 * flat(tensor).length;
    header[name] = { dtype: "F64", shape: shapeOf(tensor), data_offsets: [first, end] };
  }
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  const data = Float64Array.from(flat(Object.values(tensors)));
  writeFileSync(file, Buffer.concat([length, json, Buffer.from(data.buffer)]));
}

const folder = process.argv[2];
mkdirSync(folder, { recursive: true });
const settings = JSON.parse(readFileSync(new URL("vectors.json", VECTORS))).cases;
for (const name of CASES) {
  const results = layer(settings[name], load(new URL(`${name}.safetensors`, VECTORS)));
  save(`${folder}/${name}.safetensors`, results);
}
