"""Between a model and each of its blocks: where tokens are taken, given, and passed through.

A `BlockCall` lies where torch keeps a module's compiled call, which is the first thing that calling
a module looks at. So it is outside of everything else on the block: outside of compiled code, which
never sees the cache, and of hooks and offloading, which a skipped block does not wake. Copies of
the block, and pickled ones, come without it.

What a block's call does follows from its place: `entering` takes the tokens before block 0,
`deciding` those behind the probe, `finishing` gives or takes those behind the last block, and
`passing` leaves out a block between. They are put around the block's own call, one around the
other where a block has several places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .call import Call
from .compiling import Compile, outermost_call, set_outermost_call
from .families import BlockStack, unwrapped
from .samples import UnknownSamplesError
from .streams import join, split

BlockFunction: TypeAlias = Callable[..., Any]


class Driver(Protocol):
    """What blocks tell the model that they are in; `model.CachedModel`."""

    call: Call | None
    skips: bool

    def enter_blocks(self, call: Call, x: Tensor) -> None:
        """Tokens x [B, S, D] enter block 0."""

    def given(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What the block's `forward` gets of these arguments: see `call.Locator`."""

    def after_probe(self, call: Call, p: Tensor) -> None:
        """Tokens p [B, S, D] leave the probe: decide."""

    def distrust(self, call: Call, block: BlockCall, output: Any) -> None:
        """A block's output is not what its row says: this step is computed without the cache."""

    def reuse(self, call: Call) -> Tensor:
        """The tokens [B, S, D] of a reused step; blocks are back in their lists."""

    def after_last_block(self, call: Call, y: Tensor) -> Tensor:
        """Tokens y leave the last block; those of all samples [B, S, D]."""

    def warn(self, cause: str, message: str) -> None:
        """Warn once per run and cause."""

    def count(self, blocks: int, samples: int) -> None:
        """So many blocks ran, for so many samples."""


Role: TypeAlias = Callable[[Driver, "BlockCall", BlockFunction], BlockFunction]


class BlockCall:
    """What stands for the call of one block.

    Args:
        driver: Of the model that the block is in.
        block: The block.
        stack: What its arguments and outputs are called.
        roles: What is put around its own call, the innermost first.

    Attributes:
        places: Where its arguments are among the positional ones, by name.
    """

    def __init__(
        self, driver: Driver, block: nn.Module, stack: BlockStack, roles: tuple[Role, ...]
    ) -> None:
        self.block, self.stack = block, stack
        self.names = stack.outputs
        self.take = itemgetter(*stack.outputs)  # a tuple, or with one name a value
        self.places = _Places(block)
        self._num_outputs = len(stack.outputs)
        self._token_places = [stack.outputs.index(name) for name in stack.streams]
        self._place, self._joins = self._token_places[0], len(stack.streams) > 1
        self._driver, self._roles = driver, roles
        self._compiled: BlockFunction | None = None  # the block's call, where it is compiled
        self.call: BlockFunction | None = None  # what was installed

    @property
    def is_outermost(self) -> bool:
        """Whether calls come to us first; not, if the block was compiled since `install`."""
        return outermost_call(self.block) is self.call

    def install(self, compile_call: Compile | None = None) -> None:
        """Take the place of the block's call, whatever it is by now: plain, or compiled.

        A plain one is compiled by `compile_call`, if there is one.
        """
        if not self.is_outermost:
            self._compiled = outermost_call(self.block)
        call = self._compiled
        if call is None and compile_call is not None:
            call = compile_call(self.block._call_impl)
        if self._roles:
            call = self.block._call_impl if call is None else call
            for role in self._roles:
                call = role(self._driver, self, call)
        self.call = call
        set_outermost_call(self.block, call)

    def uninstall(self) -> None:
        """Put back what was there; if somebody compiled the block since the last step, nothing."""
        if self.is_outermost:
            set_outermost_call(self.block, self._compiled)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An argument of the block by its name."""
        return kwargs[name] if name in kwargs else args[self.places[name]]

    def tokens_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The tokens that the block is given, [B, S, D] or all streams joined."""
        given = [self.argument(name, args, kwargs) for name in self.stack.streams]
        return join([each for each in given if each is not None]) if self._joins else given[0]

    def passed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the block would return if it changed nothing."""
        return self.take({name: self.argument(name, args, kwargs) for name in self.names})

    def tokens_of(self, output: Any, call: Call) -> Tensor | None:
        """The image tokens [B, S, D] of a block's output, or all streams joined.

        `None` if it is not as the row says.
        """
        if self._num_outputs > 1:
            if not isinstance(output, (tuple, list)) or len(output) != self._num_outputs:
                return None
            if self._joins:
                streams = [output[each] for each in self._token_places if output[each] is not None]
                are_tokens = streams and all(isinstance(each, Tensor) for each in streams)
                return join(streams) if are_tokens else None
            output = output[self._place]
        if not isinstance(output, Tensor):
            return None
        if self.stack.text_in_front:
            return output[:, -call.num_tokens :]
        return output[:, : call.num_tokens] if self.stack.text_behind else output

    def with_tokens(self, values: Mapping[str, Any], y: Tensor, call: Call) -> Any:
        """A block's output, given by the names of its arguments, with these image tokens in it."""
        if self._joins:
            names = [each for each in self.stack.streams if values[each] is not None]
            parts = split(y, [values[each] for each in names])
            return self.take({**values, **dict(zip(names, parts, strict=True))})
        (name,) = self.stack.streams
        if self.stack.text_in_front:
            text = values[name][:, : -call.num_tokens]
            y = torch.cat([text.to(y.dtype), y], dim=1)
        elif self.stack.text_behind:
            text = values[name][:, call.num_tokens :]
            y = torch.cat([y, text.to(y.dtype)], dim=1)
        return self.take({**values, name: y})

    def by_name(self, output: Any) -> dict[str, Any]:
        """A block's output by the names of its arguments."""
        return dict(zip(self.names, output if len(self.names) > 1 else (output,), strict=True))

    def run_samples(
        self, inner: BlockFunction, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the block for some samples only; the others keep what they came with."""
        samples = call.samples
        assert samples is not None
        given = {name: args[i] for name, i in self.places.items() if i < len(args)} | kwargs
        try:
            gathered = samples.gather(given, self.stack.per_sample)
        except UnknownSamplesError as error:  # its arguments cannot be told apart: it runs for all
            self._driver.warn("rows", f"{type(self.block).__name__}: {error}")
            self._driver.count(1, samples.batch)
            return inner(*args, **kwargs)
        self._driver.count(1, len(samples.indices))
        named = [gathered.pop(name) for name, place in self.places.items() if place < len(args)]
        values = self.by_name(inner(*named, *args[len(self.places) :], **gathered))
        for name, part in values.items():
            values[name] = samples.scatter(part, self.argument(name, args, kwargs))
        return self.take(values)


def entering(driver: Driver, block: BlockCall, inner: BlockFunction) -> BlockFunction:
    """Block 0: note the tokens that enter it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        running = driver.call
        if running is not None:  # else the block is called on its own, outside of the model
            driver.enter_blocks(running, block.tokens_in(*driver.given(block.block, args, kwargs)))
        return inner(*args, **kwargs)

    return call


def deciding(driver: Driver, block: BlockCall, inner: BlockFunction) -> BlockFunction:
    """The last block of the probe: take the decision."""

    def call(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        running = driver.call
        if running is not None:
            _end_probe(driver, block, running, output)
        return output

    return call


def probing(driver: Driver, block: BlockCall, inner: BlockFunction) -> BlockFunction:
    """A probe of one block, `entering` and `deciding` in one: a frame less in every step."""
    (name, *others), places = block.stack.streams, block.places

    def call(*args: Any, **kwargs: Any) -> Any:
        running = driver.call
        if running is None:
            return inner(*args, **kwargs)
        got, named = driver.given(block.block, args, kwargs)
        if others:
            x = block.tokens_in(got, named)
        else:
            x = named[name] if name in named else got[places[name]]
        driver.enter_blocks(running, x)
        output = inner(*args, **kwargs)
        _end_probe(driver, block, running, output)
        return output

    return call


def _end_probe(driver: Driver, block: BlockCall, running: Call, output: Any) -> None:
    p = block.tokens_of(output, running)
    if p is None:
        driver.distrust(running, block, output)
    else:
        driver.after_probe(running, p)


def passing(driver: Driver, block: BlockCall, inner: BlockFunction) -> BlockFunction:
    """A block between probe and end: run it, for some samples or for all, or leave it out."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if driver.skips:  # nobody looked into the list that holds a twin by now
            return block.passed(args, kwargs)
        running = driver.call
        if running is not None and running.samples is not None:
            return block.run_samples(inner, running, args, kwargs)
        return inner(*args, **kwargs)

    return call


def finishing(driver: Driver, block: BlockCall, inner: BlockFunction) -> BlockFunction:
    """The last block: record its tokens, or give those of a reused step, whatever it was given."""

    def call(*args: Any, **kwargs: Any) -> Any:
        running = driver.call
        if running is None:
            return inner(*args, **kwargs)
        if driver.skips:
            values = kwargs
            if args:
                values = {name: block.argument(name, args, kwargs) for name in block.names}
            return block.with_tokens(values, driver.reuse(running), running)
        if running.samples is not None:
            output = block.run_samples(inner, running, args, kwargs)
            tokens = block.tokens_of(output, running)
            assert tokens is not None  # else it could not have been run for samples
            y = driver.after_last_block(running, running.samples.take(tokens))
            return block.with_tokens(block.by_name(output), y, running)
        output = inner(*args, **kwargs)
        tokens = block.tokens_of(output, running)
        if tokens is None:
            driver.distrust(running, block, output)
        else:
            driver.after_last_block(running, tokens)
        return output

    return call


def roles_of(index: int, probe_depth: int, num_blocks: int) -> tuple[Role, ...]:
    """What a block does by its place, the innermost role first."""
    roles: list[Role] = []
    if index == num_blocks - 1:
        roles.append(finishing)
    elif index >= probe_depth:
        roles.append(passing)
    if index == 0 and probe_depth == 1:
        roles.append(probing)
    elif index == probe_depth - 1:
        roles.append(deciding)
    elif index == 0:
        roles.append(entering)
    return tuple(roles)


class _Places(dict[str, int]):
    """Where a block's arguments are among the positional ones."""

    def __init__(self, block: nn.Module) -> None:
        function = type(unwrapped(block)).forward
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [*inspect.signature(function).parameters.values()][1:]
        super().__init__({p.name: place for place, p in enumerate(parameters) if p.kind in kinds})
        self._block = block

    def __missing__(self, name: str) -> int:
        raise TypeError(
            f"{type(self._block).__name__}.forward does not say which of its positional arguments "
            f"is {name!r}, which its family's row names. Call the block with {name}=..., or name "
            f"the argument in its forward."
        )
