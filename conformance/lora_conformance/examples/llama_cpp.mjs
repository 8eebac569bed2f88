// Compare llama.cpp with the fixtures: node llama_cpp.mjs FIXTURE BASE.gguf [ADAPTER.gguf]
// Without ADAPTER, the tokens of the base are expected. Needs node-llama-cpp: copy this file into a
// folder in which `npm install node-llama-cpp` ran, and write the path of fixtures.json below.

import fs from "node:fs";
import { getLlama } from "node-llama-cpp";

const [name, modelPath, adapter] = process.argv.slice(2);
const index = JSON.parse(fs.readFileSync(new URL("../fixtures/fixtures.json", import.meta.url)));
const fixture = index.fixtures[name];
const expected = adapter ? fixture.tokens : fixture.tokens_without_adapter;

const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: 128, threads: 1, lora: adapter });
let right = 0;
for (const [i, prompt] of index.prompts.entries()) {
  const sequence = context.getSequence();
  const found = [];
  for await (const token of sequence.evaluate(prompt.tokens, { temperature: 0 })) {
    found.push(token);
    if (found.length === expected[i].length) break;
  }
  sequence.dispose();
  if (found.join() === expected[i].join()) right += 1;
  else console.log(`prompt ${i}: ${found}, not ${expected[i]}`);
}
console.log(`${name}: ${right} of ${index.prompts.length} prompts have the right tokens`);
process.exit(right === index.prompts.length ? 0 : 1);
