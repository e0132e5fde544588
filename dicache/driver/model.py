"""`CachedModel`: a cache session inside a torch model, put on it and taken off again.

Calls are noted around the model's call, outside of its `forward`: offloading replaces a model's
`forward` at the end of every call, and whatever wraps it is lost. A step begins where tokens enter
block 0. On a reused step the blocks between probe and end pass their input through, and the last
one returns x plus the approximated residual whatever it was given: residuals that the model adds
between blocks (ControlNet) are part of y - x, and must not count twice.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AUTO, DiCacheConfig
from ..core.rules import Rules, resolve
from ..core.session import DiCacheSession
from ..core.step import GRADIENTS, Step
from ..core.warning import warn_user
from ..core.where import Where
from ..error_rules import ERROR_RULES
from ..profile import Identity, Profile
from .blocks import BlockCall, roles_of
from .bypass import Bypass, twin_class
from .call import Call, Locator, Untouched
from .compiling import Surroundings, outermost_call
from .families import BlockStack, ModelFamily, unwrapped
from .parallel import group_of_all, groups_of
from .samples import Samples


class CachedModel:
    """The cache of one model.

    Args:
        model: A torch module with the block lists that its family names.
        family: Its row.
        rules: What its session decides by.
        locator: Tells where its calls stand.
        package: Name of the package that the model's class comes from: as long as nothing but its
            code runs around the blocks, a reused step may shorten their lists.
        frees_last_steps: Whether a branch's state is freed with its last step, because nobody tells
            when a run is over.

    Raises:
        ValueError: The model cannot take the cache; nothing was changed.

    Attributes:
        session: Its session.
        locator: As given.
        call: What is known of the call that runs; `None` between calls.
        skips: Whether blocks pass their input through, from a decision to reuse to the last block;
            their lists hold other things meanwhile.
        block_calls: What stands for the call of every block, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        rules: Rules,
        locator: Locator,
        package: str,
        frees_last_steps: bool = False,
    ) -> None:
        self.model, self.family = model, family
        self._frees_last_steps = frees_last_steps
        self.locator = locator
        self._probe_depth = rules.config.probe_depth
        blocks = family.blocks(model)
        self._check(blocks)
        self.session = DiCacheSession(rules, ascending_timesteps=family.ascending_timesteps)
        self.session.identity = Identity.of(model, len(blocks))
        self._find_ranks()
        self.call: Call | None = None
        self.skips = False
        self.block_calls = [
            BlockCall(self, block, stack, roles_of(index, self._probe_depth, len(blocks)))
            for index, (block, stack) in enumerate(blocks)
        ]
        corners = sorted({0, self._probe_depth - 1, len(blocks) - 1})
        self._corner_calls = [self.block_calls[index] for index in corners]
        self._bypasses = [self._make_bypass(stack) for stack in family.stacks]
        self._parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self._surroundings = Surroundings(model)
        self._has_own_forward = _has_own_forward(model, package)
        self._bare_forward: Any = None
        self._own_compile: Any = None  # the instance's, if it has one of its own
        self._in_use = threading.Lock()
        # Whether blocks write into their x, if known. Into that of several streams they cannot: it
        # is a tensor of the cache's own.
        self._works_in_place = False if len(family.stacks[0].streams) > 1 else None

    def attach(self) -> None:
        """Take the place of the calls; `forward` is from here on what it is now."""
        model = self.model
        self._own_compile = vars(model).get("compile")
        self._bare_forward = model.forward if self._has_own_forward else None
        for call in self.block_calls:
            call.install(self._surroundings.compile)
        self._surroundings.take_call(self._call_model)
        # `model.compile(...)` and `torch.compile(model)` compile block by block: a decision takes
        # Python in the model's middle.
        model.compile = self._compile_blocks  # type: ignore[method-assign]
        model.__reduce_ex__ = self._refuse_copy  # type: ignore[method-assign]

    def detach(self) -> None:
        """Give the calls back and free the state."""
        self.session.reset()
        self._end_bypass()
        for call in self.block_calls:
            call.uninstall()
        self._surroundings.put_back()
        del self.model.__reduce_ex__
        del self.model.compile  # the instance's; the class has its own
        if self._own_compile is not None:
            self.model.compile = self._own_compile  # type: ignore[method-assign]

    def warn(self, cause: str, message: str) -> None:
        """Warn with `DiCacheWarning`, once per run and cause."""
        self.session.warn(cause, message)

    def count(self, blocks: int, samples: int) -> None:
        """Blocks that ran, for the statistics."""
        stats = self.session.stats
        stats.num_blocks = len(self.block_calls)
        stats.block_calls += blocks
        stats.block_samples += blocks * samples

    # --- one call of the model ---

    def _call_model(self, surrounding: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._in_use.acquire(blocking=False):
            self._refuse_second_call()
        try:
            self._be_in_place(surrounding)
            named = (
                {**dict(zip(self._parameters, args, strict=False)), **kwargs} if args else kwargs
            )
            self.call = call = Call(named)
            output = self.model._call_impl(*args, **kwargs)
            if call.step is None or not call.step.is_done:
                self._note_unseen_blocks(call)
                if self.skips:  # and nobody asked for the tokens of a reused step
                    self._end_bypass()
                    self.call = None
                    output = self.model._call_impl(*args, **kwargs)
            if self._frees_last_steps and call.step is not None and call.step.is_last:
                call.step.release()
        except BaseException:
            if self.call is not None and self.call.step is not None:
                self.call.step.close()
            self.session.reset()  # an aborted run leaves nothing behind
            raise
        finally:
            self.call = None
            if self.skips:
                self._end_bypass()
            self.locator.end_call()
            self._in_use.release()
        return output

    def _be_in_place(self, surrounding: Any) -> None:
        """See that calls of the blocks come to us, compiled as `surrounding` wants it."""
        if self.skips:  # an interrupt came while the last step was put away
            self._end_bypass()
        if surrounding is not self._surroundings.seen and self._surroundings.change(surrounding):
            for call in self.block_calls:
                call.install(self._surroundings.compile)
        for call in self._corner_calls:
            if outermost_call(call.block) is not call.call:  # compiled since the last step
                self._install_again()
                break

    def enter_blocks(self, call: Call, x: Tensor) -> None:
        """Open the step, and note the tokens that enter block 0."""
        where = self.locator.where(call.arguments, x.shape)
        call.step = step = self._open_step(where, call)
        if not step.stats.contexts[step.name] and self._find_ranks():  # the branch's first step
            self.session.reset()
            call.step = self._open_step(where, call)
        call.samples = call.untouched = None  # of an earlier pass, if the model makes several
        if torch.is_grad_enabled() and needs_gradients(self.model, (x, call.arguments)):
            self._leave_to_gradients(call, x.shape[0])
            return
        call.num_tokens = x.shape[1]
        call.x = x.clone() if self._works_in_place else x
        if self._works_in_place is None:
            call.untouched = Untouched(x)

    def given(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """See `blocks.Driver`."""
        return self.locator.given(block, args, kwargs)

    def _open_step(self, where: Where, call: Call) -> Step:
        if self.session.ranks.are_several:
            # A rank's part may keep its shape where another one's changes: all know the whole.
            whole = call.arguments.get(self._parameters[0])
            where = where._replace(layout=(where.layout, *(t.shape for t in _tensors_in(whole))))
        return Step(self.session, where)

    def _find_ranks(self) -> bool:
        """See who runs the blocks with us; whether it is somebody else than before.

        Raises:
            ValueError: No known group has all these ranks.
        """
        ranks, given = self.session.ranks, self.session.config.process_group
        group = group_of_all(given, [*self.locator.groups(), *groups_of(self.model)])
        has_changed = group is not ranks.group
        ranks.follow(group)
        return has_changed

    def after_probe(self, call: Call, p: Tensor) -> None:
        """Take the decision; on a computed step move x and p into the cache's buffers."""
        step, x = call.step, call.x
        if step is None or x is None:  # block 0 was replaced and nobody saw x, or gradients
            return
        if p.requires_grad and torch.is_grad_enabled():  # of the text, say
            self._leave_to_gradients(call, p.shape[0])
            return
        if call.untouched is not None:
            self._works_in_place = not call.untouched.is_true_beside(p)
            if self._works_in_place:  # x is gone; from the next step on it is copied
                self._discard(call, p.shape[0])
                return
        if p is x:
            self.warn("blind", _BLIND)
            self._discard(call, p.shape[0])
            return
        self.skips = step.needs_probe and step.probe(x, p).action == "reuse"
        if step.rows is not None:
            call.samples = Samples(step.rows, p)
        if self.skips:
            arguments = call.arguments if self._is_bare else None
            for bypass in self._bypasses:
                bypass.begin(arguments)
        else:
            step.resume(x, p)
            call.x = None
        stats = step.stats  # now: the step may have begun a run
        stats.block_calls += self._probe_depth
        stats.block_samples += self._probe_depth * p.shape[0]

    def distrust(self, call: Call, block: BlockCall, output: Any) -> None:
        """See `blocks.Driver`."""
        if call.step is None or call.step.is_done:  # told already, or block 0 was not seen
            return
        stack = block.stack
        self.warn(
            "outputs",
            f"{type(block.block).__name__} returned {_kind_of(output)}, and the row of family "
            f"{self.family.name!r} says {', '.join(stack.outputs)}, so such steps are computed. "
            f"Name what it returns in BlockStack({stack.attribute!r}, outputs=(...)).",
        )
        self._discard(call, 0)

    def reuse(self, call: Call) -> Tensor:
        """The tokens of a reused step."""
        step, x = call.step, call.x
        assert step is not None and x is not None  # set by block 0 of this call
        self._end_bypass()  # the model's head, and hooks behind it, find all blocks there
        return step.reuse(x)

    def after_last_block(self, call: Call, y: Tensor) -> Tensor:
        """Record a computed step; the tokens of all samples."""
        step = call.step
        if step is None or step.is_done or call.x is not None:  # the probe was not seen
            return y
        if call.samples is None:  # else they were counted one by one
            self.count(len(self.block_calls) - self._probe_depth, y.shape[0])
        y = step.record(y)
        self._install_again()
        return y

    def _leave_to_gradients(self, call: Call, samples: int) -> None:
        self.session.warn("gradients", GRADIENTS)
        self._discard(call, samples)

    def _discard(self, call: Call, samples: int) -> None:
        """Compute this step without keeping anything of it."""
        assert call.step is not None  # opened by block 0
        call.step.discard()
        call.x = None
        self.count(len(self.block_calls), samples)

    def _note_unseen_blocks(self, call: Call) -> None:
        if call.step is not None:
            call.step.close()
        self.session.warn(
            "unseen",
            "The blocks that the cache was applied to did not all run, so the step counts for "
            "nothing. Were blocks replaced? Call remove_dicache and apply_dicache again.",
        )

    # --- lists and calls ---

    @property
    def _is_bare(self) -> bool:
        """Whether only the model's own code runs around the blocks: nothing wraps or hooks it."""
        model = self.model
        if model._forward_pre_hooks or model._forward_hooks_always_called:
            return False
        return model.forward is self._bare_forward

    def _end_bypass(self) -> None:
        """Put the blocks back into their lists."""
        for bypass in self._bypasses:
            bypass.end()
        self.skips = False

    def _make_bypass(self, stack: BlockStack) -> Bypass:
        """What one list of blocks holds instead of those behind the probe but the last."""
        corners = {call.block for call in self._corner_calls}
        probe = {call.stack.attribute for call in self.block_calls[: self._probe_depth]}
        calls = [each for each in self.block_calls if each.stack is stack]
        classes: dict[type, type] = {}
        for call in calls:  # one a kind: what is touched in every step should be little
            kind = type(call.block)
            if kind not in classes:
                made = twin_class(kind, self, stack.outputs, tuple(call.places))
                classes |= {} if made is None else {kind: made}
        chosen = {call.block for call in calls} - corners
        is_own = self.family.is_of(type(self.model))  # not a subclass
        whole_for = stack.whole_for if is_own and stack.attribute not in probe else None
        return Bypass(getattr(self.model, stack.attribute), classes, chosen, whole_for)

    def _install_again(self) -> None:
        """Come back outside of blocks that were compiled meanwhile.

        Corners are looked at in every step, all blocks only where blocks are computed: a block
        between that nobody passes through costs time on a skipped step, but changes nothing.
        """
        for call in self.block_calls:
            if not call.is_outermost:
                call.install()

    def _compile_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Stands for the model's `compile`."""
        self._surroundings.forget_own()
        for call in self.block_calls:
            call.block.compile(*args, **kwargs)

    def _refuse_second_call(self) -> None:
        raise RuntimeError(
            f"This {type(self.model).__name__} is running already: in another thread, or this "
            f"call came from inside of it. Its cache belongs to one run at a time. Give every "
            f"thread a model of its own, let them take turns, or call remove_dicache."
        )

    def _refuse_copy(self, *_: Any) -> Any:
        """Stands for what pickle and deepcopy ask a model for."""
        raise TypeError(
            "A model with DiCache cannot be copied or pickled: its hooks would run the original's "
            "weights. Call remove_dicache first, and apply_dicache to both."
        )

    __deepcopy__ = _refuse_copy

    def _check(self, blocks: list[tuple[nn.Module, BlockStack]]) -> None:
        name = type(self.model).__name__
        for block, stack in blocks:
            _check_fit(block, stack)
        if len({id(block) for block, _ in blocks}) < len(blocks):
            raise ValueError(
                f"This {name} runs one block in several places. Expected blocks of their own: the "
                f"cache could not tell the places apart."
            )
        if self._probe_depth >= len(blocks):
            raise ValueError(
                f"probe_depth is {self._probe_depth} and this {name} has {len(blocks)} blocks. "
                f"Expected a probe_depth smaller than the number of blocks."
            )


_BLIND = (
    "The probe's blocks gave back the tokens that they were given: guidance skips them in one of "
    "its branches, say. Such a probe sees no change, so these steps are computed. Let guidance "
    "skip other layers, or set DiCacheConfig(probe_depth=...) to more blocks than it skips."
)


def rules_for(
    config: DiCacheConfig, family: ModelFamily, model: nn.Module, name: str | None = None
) -> Rules:
    """What a configuration stands for, for one model.

    Args:
        config: What the user said.
        family: The model's row.
        model: The model.
        name: The model's in its pipeline.

    Raises:
        ValueError: There is no threshold, or the profile does not fit.
    """
    threshold = family.threshold_for(ERROR_RULES[config.error], model)
    _warn_of_foreign_preset(config, family)
    profile = config.profile
    if not isinstance(profile, Profile):
        return resolve(config, threshold)
    identity = Identity.of(model, len(family.blocks(model)))
    return resolve(config, threshold, profile.name_of(name, identity, config.probe_depth))


def _warn_of_foreign_preset(config: DiCacheConfig, family: ModelFamily) -> None:
    """Published rules, threshold included, were measured on one model only."""
    preset = config.published_as
    if preset is None or (family.preset is not None and preset.startswith(family.preset)):
        return
    own = f"its own is {family.preset!r}" if family.preset else "nobody has published any for it"
    warn_user(
        f"The preset {preset!r} was published for another model than {family.model_class}: {own}. "
        f"Its threshold {config.threshold:g} may reuse far too much or nothing here; give a "
        f"threshold, or take DiCacheConfig()."
    )


def refuse_to_learn_of_several(config: DiCacheConfig, names: Collection[str]) -> None:
    """`profile="auto"` sees one model's steps, and those that share a run have one plan.

    Raises:
        ValueError: There are several models.
    """
    if config.profile == AUTO and len(names) > 1:
        raise ValueError(
            f"profile is 'auto' and there are several models, {', '.join(names)}, which may share "
            f"a run. Expected one; dicache.calibrate makes the profile of all of them."
        )


def _check_fit(block: Any, stack: BlockStack) -> None:
    """See that a row fits a block.

    Raises:
        ValueError: It is no module, or its `forward` lacks an argument that the row names.
    """
    if not isinstance(block, nn.Module):
        raise ValueError(
            f"The list {stack.attribute!r} holds a {type(block).__name__}. Expected modules, in "
            f"the order in which they run."
        )
    parameters = inspect.signature(type(unwrapped(block)).forward).parameters
    takes_any = any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    missing = [name for name in stack.outputs if name not in parameters]
    if missing and not takes_any:
        raise ValueError(
            f"{type(unwrapped(block)).__name__}.forward has no argument {missing[0]!r}, which "
            f"BlockStack({stack.attribute!r}) names. Its arguments are "
            f"{', '.join([*parameters][1:])}: outputs are what a block returns, by the names of "
            f"the arguments that it changes."
        )


def needs_gradients(model: nn.Module, given: object) -> bool:
    """Whether gradients of the model, or of tensors that it is given, are asked for."""
    wanted = any(each.requires_grad for each in _tensors_in(given))
    return wanted or any(each.requires_grad for each in model.parameters())


def _tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)
    elif isinstance(value, Mapping):
        yield from _tensors_in([*value.values()])


def _kind_of(output: object) -> str:
    """What a block returned, for people."""
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def _has_own_forward(model: nn.Module, package: str) -> bool:
    """Whether the model's class is of this package and its `forward` as it was written there."""
    kind = type(model)
    function: Any = kind.forward
    modules = [kind.__module__]
    while function is not None:  # where its code is: a wrapper borrows the name of what it wraps
        modules.append(getattr(function, "__globals__", {}).get("__name__", ""))
        function = getattr(function, "__wrapped__", None)
    are_its_own = all(module.partition(".")[0] == package for module in modules)
    return are_its_own and "forward" not in vars(model)
