"""Apply the variants of LoRA that start A and B from data, or that change each step."""

from itertools import islice

from torch.optim import Optimizer

from data.windows import Batch, Dataset
from lora.variants.lora_ga import lora_ga_layers, weight_gradients
from lora.variants.riemannian import precondition
from model.gpt2 import GPT2
from training.run import Run

BATCHES = 8  # LoRA-GA starts from the gradient of this many batches


def start_variant(model: GPT2, optimizer: Optimizer, training: Dataset, run: Run) -> None:
    """With LoRA-GA, start A and B along the gradient of the run's first batches. With --riemannian,
    precondition the gradients of each step.
    """
    if run.options.init_lora_weights == "lora_ga":
        first = list(islice(run.batches(training), BATCHES))
        start_along_gradient(model, first, run)
    if run.options.riemannian:
        optimizer.register_step_pre_hook(lambda *_: precondition(model))


def start_along_gradient(model: GPT2, batches: list[Batch], run: Run) -> None:
    """Start each A and B from dL/dW, where L is the mean loss per token of these batches."""
    num_tokens = sum(batch.num_tokens for batch in batches)
    with weight_gradients(model) as gradients:
        for batch in batches:
            for inputs, targets in batch.micro_batches():
                with run.device.autocast():
                    loss = model.loss(run.device.to_device(inputs), run.device.to_device(targets))
                (loss / num_tokens).backward()
    model.zero_grad()  # also clears the gradients of B

    run.ranks.all_reduce(*gradients.values())
    for name, layer in lora_ga_layers(model).items():
        start = layer.initial_factors(gradients[name])
        run.ranks.broadcast(*start)  # signs of singular vectors may differ between machines
        layer.start_at(*start)
