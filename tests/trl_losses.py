"""Write the losses of TRL's DPOTrainer to tests/trl_losses.json: `python -m tests.trl_losses`.

TRL needs `datasets` with pandas and pyarrow, so the tests do not require TRL. Made with trl 1.16.0,
transformers 5.24.0, peft 0.21.2 and torch 2.13.0, by `pip install trl`.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
import transformers

from tests.helpers import token_ids, write_small_tokenizer

LOSSES = Path(__file__).with_suffix(".json")
STEPS, PAIRS, BETA, LR = 12, 3, 0.1, 2e-2
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def tiny_llama() -> transformers.LlamaForCausalLM:
    """Return a Llama whose weights depend only on their index, in any version."""
    config = transformers.LlamaConfig(
        vocab_size=317,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=316,
        eos_token_id=316,
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.2, generator=generator)
    return model


def start(model: torch.nn.Module) -> torch.nn.Module:
    """Draw every A of our adapter or PEFT's adapter. B stays 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


def pairs() -> list[dict[str, list[int]]]:
    """Return the token ids of 36 questions, each with a short and a long answer."""
    made = []
    for i in range(STEPS * PAIRS):
        ids = token_ids(316, 24, seed=i).tolist()
        made.append(
            {
                "prompt_ids": ids[: 3 + i % 4],
                "chosen_ids": [*ids[7 : 9 + i % 3], 316],
                "rejected_ids": ids[12 : 18 + i % 5],
            }
        )
    return made


def main() -> None:
    import datasets
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *rest):
            return dataset  # of token ids

        def _get_train_sampler(self, *rest):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *inputs, **options):
            loss = super().compute_loss(*inputs, **options)
            last = {name: values[-1] for name, values in self._metrics["train"].items()}
            names = ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
            seen.append({"loss": loss.item()} | {name: last[name] for name in names})
            return loss

    seen: list[dict[str, float]] = []
    with TemporaryDirectory() as directory:
        write_small_tokenizer(Path(directory), 317)
        options = trl.DPOConfig(
            output_dir=directory,
            beta=BETA,
            learning_rate=LR,
            lr_scheduler_type="constant",
            per_device_train_batch_size=PAIRS,
            max_steps=STEPS,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        trainer = Trainer(
            tiny_llama(),
            args=options,
            train_dataset=datasets.Dataset.from_list(pairs()),
            processing_class=transformers.AutoTokenizer.from_pretrained(directory),
            peft_config=peft.LoraConfig(**LORA, task_type="CAUSAL_LM"),
        )
        start(trainer.model)
        trainer.train()
    LOSSES.write_text(json.dumps(seen, indent=1) + "\n")


if __name__ == "__main__":
    main()
