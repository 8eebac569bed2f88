"""Train in parallel: `torchrun` starts several processes, which share each batch.

Every process has the whole model. A process adds up the losses of its windows, divides the sum by
the number of tokens in the whole batch, and computes the gradient. The sum of these gradients over
all processes is the gradient of the whole batch. So the number of processes changes the speed, but
not the result, except for rounding, and for dropout, because each process draws separate masks.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # a later import would keep the process group alive
from torch import Tensor, nn

from common.errors import RunError, UserError, first_line

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # other processes wait while process 0 downloads or saves


@dataclass(frozen=True)
class Processes:
    """The number of this process, from 0, and the count of all processes.

    Methods raise RunError if another process has ended.
    """

    number: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Read torchrun's environment. Without torchrun, there is only this process."""
        # Without torchrun, a cluster may still set RANK.
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    @property
    def is_main(self) -> bool:
        """Return whether this is process 0, the only process that writes files and prints."""
        return self.number == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Connect the processes inside the `with` block. In the block, only process 0 prints."""
        if self.count == 1:
            yield
            return
        if device.type == "mps":  # pytorch#160732
            raise UserError("torchrun: processes cannot exchange MPS tensors; use --device cpu")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        self._call(lambda: dist.init_process_group(backend, timeout=PATIENCE))
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(sys.stdout if self.is_main else nowhere),
        ):
            try:
                yield
            except SystemExit:  # after a signal, all processes end together
                dist.destroy_process_group()
                raise
            except BaseException:
                self._abort_nccl()  # NCCL would wait for other processes, and warn at exit
                raise
        dist.destroy_process_group()

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:  # gloo raises a plain RuntimeError
            if dist.is_initialized():
                self._abort_nccl()  # NCCL would wait for the process that has ended
                dist.destroy_process_group()  # otherwise a gloo thread can abort Python's exit
            raise RunError(
                f"process {self.number} of {self.count}: the connection to another process is "
                f"lost ({first_line(error)}); see the error message of that process"
            ) from error

    def _abort_nccl(self) -> None:
        """Abort the NCCL backend of the process group, if the group has one."""
        if dist.is_initialized() and "nccl" in dist.get_backend():  # such as "cpu:gloo,cuda:nccl"
            assert dist.group.WORLD
            dist.group.WORLD.abort()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on process 0 first, so that the others find the downloads of process 0."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        """Wait until every process arrives here."""
        self.maximum(0)

    def check_same(self, identity: dict[str, Any]) -> None:
        """Raise UserError in every process if processes differ in options, base or book."""
        first, *others = self.gather(identity)
        for number, other in enumerate(others, 1):
            different = [name for name in first if other[name] != first[name]]
            if different:
                raise UserError(
                    f"process {number} and process 0 differ in {', '.join(different)}; start "
                    "every process with the same options, base and book"
                )

    def broadcast(self, *tensors: Tensor) -> None:
        """Give every process the tensors of process 0."""
        if self.count > 1:
            for tensor in tensors:
                self._call(partial(dist.broadcast, tensor.detach(), 0))

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes. All tensors travel in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._call(lambda: dist.all_reduce(flat))
        sizes = [tensor.numel() for tensor in tensors]
        totals = [t.view_as(x) for t, x in zip(flat.split(sizes), tensors, strict=True)]
        torch._foreach_copy_(list(tensors), totals)  # one kernel launch for all tensors

    def all_reduce_gradients(self, model: nn.Module, loss: Tensor) -> None:
        """Sum the loss and all gradients over all processes. One without windows adds zeros."""
        if self.count == 1:
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.all_reduce(loss, *(p.grad for p in trained if p.grad is not None))

    def maximum(self, *values: int) -> list[int]:
        """Return the maximum of each number over the processes. The numbers stay on the CPU, so no
        process waits for a GPU."""
        if self.count == 1:
            return list(values)
        shared = torch.tensor(values)
        self._call(lambda: dist.all_reduce(shared, dist.ReduceOp.MAX))
        return shared.tolist()

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in order of number."""
        values: list = [value] * self.count
        if self.count > 1:
            self._call(lambda: dist.all_gather_object(values, value))
        return values

    def from_main(self, value: T) -> T:
        """Return process 0's value."""
        values = [value]
        if self.count > 1:
            self._call(lambda: dist.broadcast_object_list(values))
        return values[0]


ALONE = Processes()  # one process, without torchrun
