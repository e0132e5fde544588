"""Families that users register: models of other packages, with other names and other habits.

A toy model stands for all of them. It is smooth, so a reused step is known by its formula and an
un-cached twin says what a computed one has to be.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import LatteTransformer3DModel
from helpers import masks
from tiny_models import build, calls
from torch import Tensor, nn

from dicache import (
    BlockStack,
    DiCacheConfig,
    ModelFamily,
    apply_dicache,
    get_stats,
    register_family,
    remove_dicache,
)
from dicache.adapters.diffusers.attach import cache_on
from dicache.driver import families
from dicache.driver.streams import join, split

RULES = DiCacheConfig(schedule="CCRRCR", num_inference_steps=6)


class Block(nn.Module):
    """Returns (tokens, text), and calls its tokens `states`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, text: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return states + self.linear(states).sin() + text.mean(), text


class PlainTransformer(nn.Module):
    """A model that knows nothing of diffusers' mixins."""

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))

    def forward(self, states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text = encoder_hidden_states
        for layer in self.layers:
            states, text = layer(text, states=states)
        return states


STACK = BlockStack("layers", outputs=("states", "text"), hidden_states="states")
PLAIN = ModelFamily("plain", "PlainTransformer", (STACK,), threshold=0.5)


@pytest.fixture(autouse=True)
def no_family_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", [*families._FAMILIES])


def make(kind: Callable[[], nn.Module] = PlainTransformer) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def inputs_of(num_steps: int = 6) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, timestep and text of the steps of a run."""
    first, last = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    text = torch.ones(1, 3, 8)
    shares = torch.linspace(0, 1, num_steps)
    return [
        ((1 - share) * first + share * last, torch.tensor([float(num_steps - index)]), text)
        for index, share in enumerate(shares)
    ]


def run(model: nn.Module, num_steps: int = 6) -> list[Tensor]:
    return [
        model(*(each.clone() for each in given[:2]), given[2]) for given in inputs_of(num_steps)
    ]


@contextlib.contextmanager
def told(match: str) -> Iterator[None]:
    """Exactly one warning is given, and it says this."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(each.message) for each in caught]
    assert len(messages) == 1, messages
    assert match in messages[0]


# --- the row -------------------------------------------------------------------------------------


def test_a_family_of_the_users_own() -> None:
    register_family(PLAIN)
    model, prompt = make(), torch.randn(1, 3, 8)
    apply_dicache(model, DiCacheConfig(schedule="CR"))
    first, second = torch.randn(2, 1, 4, 8)
    y = model(first, torch.tensor(1.0), prompt)
    reused = model(second, torch.tensor(0.5), encoder_hidden_states=prompt)
    assert torch.allclose(reused, second + (y - first), atol=1e-6)  # one entry: y = x + r_new
    assert get_stats(model).block_calls == 4 + 1
    remove_dicache(model)
    assert not torch.allclose(model(second, torch.tensor(0.5), prompt), reused)


def test_a_family_is_registered_once() -> None:
    register_family(PLAIN)
    with pytest.raises(ValueError, match="registered already.*another package.*module"):
        register_family(PLAIN)


def test_a_family_needs_its_blocks() -> None:
    register_family(PLAIN)
    model = make()
    del model.layers
    with pytest.raises(ValueError, match="no block list 'layers'"):
        apply_dicache(model)


def test_the_default_rules_take_the_rows_alignment_threshold() -> None:
    register_family(
        ModelFamily("plain", "PlainTransformer", (STACK,), 0.5, alignment_threshold=0.03)
    )
    for rules, expected in (
        (DiCacheConfig(), 0.03),
        (DiCacheConfig(error="delta_y", alignment="l1"), 0.5),
        (DiCacheConfig(threshold=0.2), 0.2),
    ):
        model = make()
        apply_dicache(model, rules)
        cache = cache_on(model)
        assert cache is not None and cache.session.config.threshold == expected


# --- classes and modules -------------------------------------------------------------------------


def test_rows_for_classes_of_one_name_are_told_apart_by_module() -> None:
    for name, module in (("any", None), ("ours", "engine"), ("its part", "engine.models")):
        register_family(ModelFamily(name, "Transformer", (STACK,), 0.5, module=module))
    for module, expected in (
        ("engine.models.video", "its part"),
        ("engine.other", "ours"),
        ("engine", "ours"),
        ("engines", "any"),
        ("elsewhere", "any"),
    ):
        kind = type("Transformer", (nn.Module,), {"__module__": module})
        found = families.find_family(kind())
        assert found is not None and found.name == expected


def test_a_subclass_has_its_base_classes_row() -> None:
    register_family(PLAIN)
    model = make(type("MyOwn", (PlainTransformer,), {}))
    apply_dicache(model, RULES)
    run(model)
    assert masks(model) == {"branch0": "CCRRCR"}


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_a_foreign_class_with_the_name_of_a_known_one_is_not_taken_for_it(name: str) -> None:
    kind = type(name, (PlainTransformer,), {"__module__": "somebody.elses"})
    with pytest.raises(ValueError, match=f"does not support {name}.*register_family"):
        apply_dicache(make(kind))


class Latte(LatteTransformer3DModel):
    """A subclass, of which the same is true."""


@pytest.mark.parametrize("kind", [LatteTransformer3DModel, Latte])
def test_what_cannot_be_supported_is_told_why(kind: type[Any]) -> None:
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2}
    norm = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False}
    model = kind(**sizes, **norm, sample_size=4, caption_channels=8)
    with pytest.raises(ValueError, match=f"cannot support {kind.__name__}: its last block returns"):
        apply_dicache(model)
    plain = make(type("LatteTransformer3DModel", (PlainTransformer,), {}))
    with pytest.raises(ValueError, match="does not support LatteTransformer3DModel.*Supported"):
        apply_dicache(plain)  # of another package
    stack = BlockStack("temporal_transformer_blocks")
    register_family(ModelFamily("latte", "LatteTransformer3DModel", (stack,), threshold=0.5))
    with pytest.raises(ValueError, match="probe_depth"):  # the user's row, which has one block
        apply_dicache(model)


# --- names of arguments --------------------------------------------------------------------------


class Renamed(PlainTransformer):
    """Takes (hidden, sigma, prompt)."""

    def forward(self, states: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(states, sigma, prompt)


def renamed(**names: Any) -> ModelFamily:
    return ModelFamily("renamed", "Renamed", (STACK,), threshold=0.5, **names)


def test_named_arguments_tell_everything() -> None:
    register_family(renamed(timestep="sigma", text="prompt"))
    model = make(Renamed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_dicache(model, RULES)
        for _ in range(2):
            run(model)
            assert masks(model) == {"branch0": "CCRRCR"}


def test_a_wrong_name_of_the_timestep_is_told_and_computed() -> None:
    register_family(renamed(text="prompt"))
    model, plain = make(Renamed), run(make(Renamed))
    with told("forward has no argument 'timestep', so new runs cannot be told"):
        apply_dicache(model, RULES)
    with told("Nobody can tell which branch"):
        outputs = run(model)
    assert all(torch.equal(*pair) for pair in zip(outputs, plain, strict=True))


def test_a_wrong_name_of_the_text_is_told_and_computed() -> None:
    register_family(renamed(timestep="sigma"))
    model, plain = make(Renamed), run(make(Renamed))
    with told("'encoder_hidden_states', so branches of guidance cannot be told apart"):
        apply_dicache(model, RULES)
    with told("Nobody can tell which branch"):
        outputs = run(model)
    assert all(torch.equal(*pair) for pair in zip(outputs, plain, strict=True))


def test_a_model_without_text_says_so_and_has_one_branch() -> None:
    register_family(renamed(timestep="sigma", text=None))
    model = make(Renamed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_dicache(model, RULES)
        run(model)
    assert masks(model) == {"branch0": "CCRRCR"}


def test_a_model_without_timestep_is_computed_where_nothing_else_tells_the_steps() -> None:
    register_family(renamed(timestep=None, text="prompt"))
    model, plain = make(Renamed), run(make(Renamed))
    apply_dicache(model, RULES)
    with told("Nobody can tell"):
        outputs = run(model)
    assert all(torch.equal(*pair) for pair in zip(outputs, plain, strict=True))


class TakesAnything(PlainTransformer):
    def forward(self, states: Tensor, *rest: Tensor, **others: Any) -> Tensor:  # type: ignore[override]
        return super().forward(states, others["timestep"], others["encoder_hidden_states"])


def test_a_forward_that_takes_anything_is_believed() -> None:
    register_family(ModelFamily("any", "TakesAnything", (STACK,), threshold=0.5))
    model = make(TakesAnything)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_dicache(model, RULES)
        for states, timestep, text in inputs_of():
            model(states, timestep=timestep, encoder_hidden_states=text)
    assert masks(model) == {"branch0": "CCRRCR"}


# --- what blocks return --------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [("states", "text", "audio"), ("states", "routing")])
def test_a_second_stream_is_refused_unless_somebody_says_what_it_is(
    outputs: tuple[str, ...],
) -> None:
    stream = outputs[-1]
    stack = BlockStack("layers", outputs=outputs, hidden_states="states")
    with pytest.raises(
        ValueError, match=f"return {stream!r} beside .*unread.*'states', {stream!r}"
    ):
        ModelFamily("plain", "PlainTransformer", (stack,), threshold=0.5)
    ModelFamily("plain", "PlainTransformer", (stack,), 0.5, unread=("text", stream))
    both = replace(stack, hidden_states=("states", stream))
    ModelFamily("plain", "PlainTransformer", (both,), 0.5)


def test_blocks_have_to_return_the_tokens() -> None:
    with pytest.raises(ValueError, match="Expected 'hidden_states' among them"):
        ModelFamily("plain", "Plain", (BlockStack("layers", outputs=("text",)),), threshold=0.5)


def test_a_family_has_blocks() -> None:
    with pytest.raises(ValueError, match="has no stacks"):
        ModelFamily("plain", "Plain", (), threshold=0.5)


# --- several streams -----------------------------------------------------------------------------


class TwoStreamBlock(nn.Module):
    """Returns (sound, picture), of widths 6 and 8; each is made from both."""

    def __init__(self) -> None:
        super().__init__()
        self.to_picture, self.to_sound = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, sound: Tensor | None, picture: Tensor) -> tuple[Tensor | None, Tensor]:
        heard = 0.0 if sound is None else self.to_picture(sound).mean(1, keepdim=True)
        seen = self.to_sound(picture).mean(1, keepdim=True)
        moved = picture + (heard + picture.flip(-1)).sin()
        return (None if sound is None else sound + (seen + sound.flip(-1)).sin()), moved


class TwoStreams(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = TwoStreamBlock) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))

    def forward(
        self, picture: Tensor, timestep: Tensor, text: Tensor, sound: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        for layer in self.layers:
            sound, picture = layer(sound, picture=picture)
        if sound is not None:
            sound = sound.view(-1, 6)  # as a head may do with what blocks return
        return sound, picture.view(-1, 8)


SOUND_AND_PICTURE = BlockStack(
    "layers",
    outputs=("sound", "picture"),
    hidden_states=("picture", "sound"),
    per_sample=("picture", "sound"),
)
TWO = ModelFamily("two", "TwoStreams", (SOUND_AND_PICTURE,), threshold=0.5, text="text")
# Of a sample's 40 * 8 and 3 * 6 elements: the first stream has about 4^2 times as many.
WEIGHTS = (0.25, 1.0)


def two_streams(num_steps: int = 6, batch: int = 2, jump: int = -1) -> list[tuple[Tensor, ...]]:
    """Arguments of the calls of a run; in step `jump` the sound is another."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(2, batch, 40, 8, generator=generator)
    sounds = torch.randn(3, batch, 3, 6, generator=generator)
    text, calls = torch.ones(batch, 3, 8), []
    for step in range(num_steps):
        share = step / (num_steps - 1)
        picture, sound = ((1 - share) * a + share * b for a, b in (pictures, sounds[:2]))
        timestep = torch.full((batch,), float(num_steps - step))
        calls.append((picture, timestep, text, sounds[2] if step == jump else sound))
    return calls


def test_both_streams_follow_the_formula() -> None:
    """y = x + r_old + gamma (r_new - r_old), gamma being that of both as they are weighed."""
    register_family(TWO)
    model, plain, steps = make(TwoStreams), make(TwoStreams), two_streams()
    seen: dict[str, list[list[Tensor]]] = {"x": [], "p": [], "y": []}

    def note(name: str, streams: tuple[Tensor, Tensor]) -> None:
        seen[name].append([each.double() for each in streams])

    first, last = plain.layers[0], plain.layers[-1]
    first.register_forward_pre_hook(
        lambda _, args, kwargs: note("x", (kwargs["picture"], args[0])), with_kwargs=True
    )
    first.register_forward_hook(lambda _, args, output: note("p", output[::-1]))
    last.register_forward_hook(lambda _, args, output: note("y", output[::-1]))
    expected = [plain(*given) for given in steps]
    apply_dicache(model, DiCacheConfig(schedule="CCRRCR", gamma_range=(0, None)))
    outputs = [model(*given) for given in steps]
    (records,) = get_stats(model).contexts.values()
    window: list[int] = []
    for step, (sound, picture) in enumerate(outputs):
        if "CCRRCR"[step] == "C":
            window = [*window[-1:], step]
            assert torch.equal(sound, expected[step][0]) and torch.equal(picture, expected[step][1])
            continue
        old, new = window
        probes = [
            [p - x for p, x in zip(seen["p"][k], seen["x"][k], strict=True)] for k in range(6)
        ]
        a_d = d_d = 0.0
        for weight, now, before, after in zip(
            WEIGHTS, probes[step], probes[old], probes[new], strict=True
        ):
            a, d = now - before, after - before
            a_d, d_d = a_d + weight**2 * (a * d).sum(), d_d + weight**2 * (d * d).sum()
        gamma = float(a_d / d_d)
        assert records[step].gamma == pytest.approx(gamma, rel=1e-4)
        for stream, output in enumerate((picture, sound)):
            r_old, r_new = (seen["y"][k][stream] - seen["x"][k][stream] for k in (old, new))
            wanted = seen["x"][step][stream] + r_old + gamma * (r_new - r_old)
            assert torch.allclose(output, wanted.flatten(0, 1).float(), atol=1e-5)


def test_a_change_of_the_smaller_stream_alone_is_seen() -> None:
    """Were streams to count by their size, 4 of 5 such changes would pass for small ones."""
    register_family(TWO)
    errors = {}
    for jump in (-1, 9):
        model = make(TwoStreams)
        rules = {"threshold": 0, "retention_ratio": 0, "error": "delta_y", "alignment": "l1"}
        apply_dicache(model, DiCacheConfig(**rules, num_inference_steps=12))
        for given in two_streams(12, jump=jump):
            model(*given)
        (records,) = get_stats(model).contexts.values()
        errors[jump] = records[9].error
    assert errors[9] > 4 * errors[-1]


def test_samples_of_two_streams_go_their_own_ways() -> None:
    register_family(TWO)
    rules = {"threshold": 0.05, "granularity": "sample", "retention_ratio": 0}
    steps, runs = two_streams(12), []
    for picture, *_, sound in steps:
        bend = torch.tensor([0.0, 1.5]).view(-1, 1, 1) * picture.sum().sin()
        picture += bend
        sound += bend
    for rows in (slice(None), slice(0, 1), slice(1, 2)):
        model = make(TwoStreams)
        apply_dicache(model, DiCacheConfig(**rules, num_inference_steps=12))
        text = steps[0][2][rows]
        made = [model(x[rows], t[rows], text, sound[rows]) for x, t, _, sound in steps]
        (records,) = get_stats(model).contexts.values()
        runs.append(([record.action for record in records], made))
    (together, outputs), *alone = runs
    assert together[::2] != together[1::2]
    for row, (actions, made) in enumerate(alone):
        assert actions == together[row::2]
        for pair, wanted in zip(outputs, made, strict=True):
            for output, expected in zip(pair, wanted, strict=True):
                assert torch.allclose(output.chunk(2)[row], expected, atol=1e-5)


class TwoStreamsInPlace(TwoStreamBlock):
    def forward(self, sound: Tensor | None, picture: Tensor) -> tuple[Tensor | None, Tensor]:
        output = super().forward(sound, picture)
        for given, made in zip((sound, picture), output, strict=True):
            if given is not None and made is not None:
                given.copy_(made)
        return sound, picture


class TwoStreamsOfTwoDtypes(TwoStreamBlock):
    def forward(self, sound: Tensor | None, picture: Tensor) -> tuple[Tensor | None, Tensor]:
        assert sound is not None and sound.dtype == torch.float64
        made = super().forward(sound.float(), picture)
        assert made[0] is not None
        return made[0].double(), made[1]


@pytest.mark.parametrize("kind", [TwoStreamsInPlace, TwoStreamsOfTwoDtypes])
def test_streams_are_written_in_place_and_have_dtypes_of_their_own(kind: type[nn.Module]) -> None:
    register_family(TWO)
    outputs = []
    for block in (TwoStreamBlock, kind):
        model = make(lambda: TwoStreams(block))  # noqa: B023
        apply_dicache(model, DiCacheConfig(schedule="CCRRCR"))
        double = block is TwoStreamsOfTwoDtypes
        made = []
        for picture, timestep, text, sound in two_streams():
            made += model(picture.clone(), timestep, text, sound.double() if double else sound)
        assert masks(model) == {"branch0": "CCRRCR"}
        outputs.append(made)
    of_sound = torch.float64 if double else torch.float32
    assert {output.dtype for output in outputs[1][::2]} == {of_sound}
    assert {output.dtype for output in outputs[1][1::2]} == {torch.float32}
    for pair in zip(*outputs, strict=True):
        assert torch.allclose(pair[0].double(), pair[1].double(), atol=1e-5)


def test_a_stream_that_a_call_lacks() -> None:
    """Video without sound: the other stream is all that is cached, and a run of its own."""
    register_family(TWO)
    model, silent = make(TwoStreams), [(*given[:3], None) for given in two_streams()]
    apply_dicache(model, DiCacheConfig(schedule="CRRRRR"))
    first, *_ = two_streams()
    y = make(TwoStreams)(*silent[0])[1]
    for given in (*two_streams(), *silent):
        sound, picture = model(*given)
    assert sound is None
    x, x_first = silent[-1][0], first[0]
    assert torch.allclose(picture, (x - x_first).flatten(0, 1) + y, atol=1e-5)
    assert masks(model) == {"branch0": "CRRRRR"}


def test_gradients_of_one_stream_alone_are_left_to_autograd() -> None:
    register_family(TWO)
    model, plain = make(TwoStreams), make(TwoStreams)
    apply_dicache(model, DiCacheConfig(schedule="CRRRRR"))
    found = []
    for each in (model, plain):
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            for picture, timestep, text, sound in two_streams():
                sound.requires_grad_()
                each(picture, timestep, text, sound)[1].sum().backward()
        found.append(sound.grad)
    assert torch.equal(*found) and found[0].any()


def test_compiled_blocks_of_two_streams() -> None:
    register_family(TWO)
    outputs = []
    for compiles in (False, True):
        model = make(TwoStreams)
        apply_dicache(model, DiCacheConfig(schedule="CCRRCR"))
        if compiles:
            for layer in model.layers:
                layer.compile(backend="eager", fullgraph=True)
        outputs.append([each for given in two_streams() for each in model(*given)])
        assert masks(model) == {"branch0": "CCRRCR"}
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    torch._dynamo.reset()


def test_rows_whose_streams_do_not_fit_are_refused() -> None:
    other = replace(SOUND_AND_PICTURE, hidden_states="picture")
    for stacks, message in (
        ((replace(SOUND_AND_PICTURE, text_in_front=True),), "have 2 token streams, and text in"),
        ((SOUND_AND_PICTURE, other), "have 1 token streams and those of 'layers' 2"),
        (
            (replace(SOUND_AND_PICTURE, hidden_states=("picture", "noise")),),
            "Expected 'noise' among",
        ),
        ((replace(SOUND_AND_PICTURE, hidden_states=()),), "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelFamily("two", "TwoStreams", stacks, threshold=0.5)


def test_streams_of_a_family_that_return_something_else_are_told() -> None:
    class Returns(TwoStreamBlock):
        def forward(self, sound: Tensor | None, picture: Tensor) -> Any:
            return super().forward(sound, picture)[0], [picture]

    class Takes(TwoStreams):
        def forward(self, picture: Tensor, timestep: Tensor, text: Tensor, sound: Any) -> Any:
            for layer in self.layers:
                sound, (picture,) = layer(sound, picture=picture)
            return sound, picture

    register_family(replace(TWO, model_class="Takes"))
    model, plain = make(lambda: Takes(Returns)), make(lambda: Takes(Returns))
    apply_dicache(model, RULES)
    with told("returned a tuple of 2"):
        outputs = [model(*given) for given in two_streams()]
    for made, given in zip(outputs, two_streams(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(made, plain(*given), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_joining_streams_loses_nothing(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    streams = [
        torch.randn(2, *shape, generator=generator).to(dtype)
        for shape in ((90, 12), (7, 8), (1, 4))
    ]
    streams[1][0, 0, 0] = 6e4  # within reach of fp16, and it does not come nearer to its end
    joined = join(streams)
    assert joined.shape == (2, 90 * 3 + 7 * 2 + 1, 4) and joined.isfinite().all()
    lost = 2.0**-21 if dtype == torch.float16 else 0.0  # half of 2^-24, times 16
    for made, stream in zip(split(joined, streams), streams, strict=True):
        assert (made - stream).abs().max() <= lost and made.is_contiguous()
    ones = join([torch.ones_like(each) for each in streams]).double()
    sums = [part.square().sum() for part in ones.split([270, 14, 1], dim=1)]
    assert all(0.5 <= part / sums[-1] <= 2 for part in sums)


# --- blocks that write into their input ----------------------------------------------------------


class Adds(Block):
    """Returns the very tensor that it was given."""

    def forward(self, text: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        states += self.linear(states).sin()
        return states, text


class AddsToView(Block):
    """Returns a view of the tensor that it was given."""

    def forward(self, text: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        flat = states.view(-1, 8)
        flat.add_(self.linear(flat).sin())
        return flat.view(states.shape), text


class Spoils(Block):
    """Returns a new tensor, and leaves something else in the one that it was given."""

    def forward(self, text: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        output = states + self.linear(states).sin()
        states.zero_()
        return output, text


MODES = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("block", [Adds, AddsToView, Spoils])
def test_blocks_that_write_into_their_input_give_the_same_as_those_that_do_not(
    block: type[Block], depth: int, mode: Any
) -> None:
    register_family(PLAIN)
    outputs = {}
    rules = DiCacheConfig(schedule="CCCRRCR", probe_depth=depth, num_inference_steps=7)

    class Clean(Block):
        def forward(self, text: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
            return block.forward(self, text, states.clone())

    for kind in (block, Clean):
        torch.manual_seed(0)
        model = PlainTransformer(kind).requires_grad_(False)
        apply_dicache(model, rules)
        with mode():
            outputs[kind] = run(model, 7)
        assert masks(model) == {"branch0": "CCCRRCR"}
    for written, clean in zip(outputs[block], outputs[Clean], strict=True):
        assert torch.allclose(written, clean, atol=1e-6)


class WritesUncounted(Block):
    """As another package's kernel does: torch does not count this write."""

    def forward(self, text: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        output = states + self.linear(states).sin()
        states.data.mul_(-1)
        return output, text


def test_writes_that_torch_does_not_count() -> None:
    register_family(PLAIN)
    outputs = []
    for prepare in (lambda states: states, Tensor.clone):

        class Given(WritesUncounted):
            def forward(self, text: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
                return super().forward(text, self.prepare(states))

        Given.prepare = staticmethod(prepare)
        model = make(lambda: PlainTransformer(Given))  # noqa: B023
        apply_dicache(model, DiCacheConfig(schedule="CCCRRCR", num_inference_steps=7))
        outputs.append(run(model, 7))
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*outputs, strict=True))


def test_of_such_blocks_the_very_first_step_is_not_kept() -> None:
    """Its tokens x are gone before that is known; no other step is lost, nor one of a later run."""
    register_family(PLAIN)
    model = make(lambda: PlainTransformer(Adds))
    apply_dicache(model, DiCacheConfig(schedule="CRRRRR", num_inference_steps=6))
    run(model)
    assert masks(model) == {"branch0": "CCRRRR"}
    assert get_stats(model).block_calls == 2 * 4 + 4 * 1
    run(model)
    assert masks(model) == {"branch0": "CRRRRR"}


# --- wrappers ------------------------------------------------------------------------------------


class FullyShardedDataParallel(nn.Module):
    """As torch's looks from outside: the block under another name, and a call without names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._fsdp_wrapped_module(*args, **kwargs)


class CheckpointWrapper(FullyShardedDataParallel):
    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self._checkpoint_wrapped_module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint_wrapped_module(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [
        FullyShardedDataParallel,
        CheckpointWrapper,
        lambda block: FullyShardedDataParallel(CheckpointWrapper(block)),
    ],
    ids=["fsdp", "checkpoint", "both"],
)
def test_blocks_in_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    register_family(PLAIN)
    outputs = []
    for change in (lambda block: block, wrap):
        model = make()
        for index, block in enumerate(model.layers):
            model.layers[index] = change(block)
        apply_dicache(model, RULES)
        outputs.append(run(model))
        assert masks(model) == {"branch0": "CCRRCR"}
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_wrapped_blocks_of_a_known_family() -> None:
    outputs = []
    for wrap in (lambda block: block, FullyShardedDataParallel):
        model = build("flux")
        for blocks in (model.transformer_blocks, model.single_transformer_blocks):
            for index, block in enumerate(blocks):
                blocks[index] = wrap(block)
        apply_dicache(model, RULES)
        outputs.append([model(**inputs)[0] for inputs in calls("flux", 6)])
        assert masks(model) == {"branch0": "CCRRCR"}
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


# --- rows that do not fit ------------------------------------------------------------------------


def returning(change: Callable[[Tensor, Tensor], Any]) -> type[Block]:
    class Returns(Block):
        def forward(self, text: Tensor, states: Tensor) -> Any:
            return change(*super().forward(text, states))

    return Returns


class TakesLoosely(PlainTransformer):
    """Takes from blocks whatever holds the tokens."""

    def forward(self, states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            output = layer(encoder_hidden_states, states=states)
            states = output["states"] if isinstance(output, dict) else output
            states = states[0] if isinstance(states, tuple) else states
        return states


UNFIT: dict[str, tuple[Any, str]] = {
    "a dictionary": (lambda states, text: {"states": states}, "returned a dict"),
    "one value too few": (lambda states, text: states, "returned a Tensor"),
    "one value too many": (lambda states, text: (states, text, text), "returned a tuple of 3"),
}


@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
def test_outputs_that_are_not_as_the_row_says_are_told_and_computed(
    change: Any, message: str
) -> None:
    register_family(replace(PLAIN, model_class="TakesLoosely"))
    model, plain = (make(lambda: TakesLoosely(returning(change))) for _ in range(2))
    apply_dicache(model, RULES)
    with told(message):
        outputs = run(model)
    assert all(torch.equal(*pair) for pair in zip(outputs, run(plain), strict=True))
    assert masks(model) == {"branch0": "CCCCCC"}


def test_a_bare_tensor_where_the_row_says_so_must_be_one() -> None:
    stack = BlockStack("layers", outputs=("states",), hidden_states="states")
    register_family(replace(PLAIN, model_class="TakesLoosely", stacks=(stack,)))
    model = make(lambda: TakesLoosely(returning(lambda states, text: (states,))))
    apply_dicache(model, RULES)
    with told("returned a tuple of 1"):
        run(model)
    assert masks(model) == {"branch0": "CCCCCC"}


def test_an_argument_that_blocks_lack_is_refused_with_the_ones_that_they_have() -> None:
    stack = BlockStack("layers", outputs=("tokens", "text"), hidden_states="tokens")
    register_family(replace(PLAIN, stacks=(stack,)))
    with pytest.raises(ValueError, match="no argument 'tokens'.*arguments are text, states"):
        apply_dicache(make(), RULES)


def test_a_list_of_something_else_than_modules_is_refused() -> None:
    register_family(PLAIN)
    model = make()
    model.layers = nn.ModuleDict({str(k): block for k, block in enumerate(model.layers)})
    with pytest.raises(ValueError, match="'layers' holds a str. Expected modules"):
        apply_dicache(model, RULES)


class PositionalOnly(Block):
    def forward(self, text: Tensor, /, states: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(text, states)


class CallsByPosition(PlainTransformer):
    def forward(self, states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text = encoder_hidden_states
        for layer in self.layers:
            states, text = layer(text, states)
        return states


def test_positional_only_arguments_have_their_places() -> None:
    register_family(replace(PLAIN, model_class="CallsByPosition"))
    outputs = []
    for block in (Block, PositionalOnly):
        model = make(lambda: CallsByPosition(block))  # noqa: B023
        apply_dicache(model, RULES)
        outputs.append(run(model))
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


class Nameless(Block):
    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        return super().forward(*args)


def test_arguments_that_nobody_can_name_are_told() -> None:
    register_family(replace(PLAIN, model_class="CallsByPosition"))
    model = make(lambda: CallsByPosition(Nameless))
    apply_dicache(model, RULES)
    with pytest.raises(TypeError, match="does not say which of its positional arguments"):
        run(model)


# --- models that do not run all blocks, or run them twice -----------------------------------------


class LeavesTheLastOut(PlainTransformer):
    last = 4

    def forward(self, states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text = encoder_hidden_states
        for layer in self.layers[: self.last]:
            states, text = layer(text, states=states)
        return states


def test_a_reused_step_whose_last_block_is_not_called_is_run_again() -> None:
    register_family(replace(PLAIN, model_class="LeavesTheLastOut"))
    model, plain = make(LeavesTheLastOut), make(LeavesTheLastOut)
    apply_dicache(model, DiCacheConfig(schedule="CCRRRR", num_inference_steps=6))
    with told("did not all run"):
        for index, (states, time, text) in enumerate(inputs_of()):
            model.last = plain.last = 4 if index < 2 else 3
            output = model(states, time, text)
            assert torch.equal(output, plain(states, time, text))


class RunsTwice(PlainTransformer):
    def forward(self, states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        for _ in range(2):
            states = super().forward(states, timestep, encoder_hidden_states)
        return states


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_model_that_runs_its_blocks_twice_fails_open(granularity: str) -> None:
    register_family(replace(PLAIN, model_class="RunsTwice"))
    model, plain = make(RunsTwice), make(RunsTwice)
    rules = DiCacheConfig(threshold=0.02, retention_ratio=0, granularity=granularity)
    apply_dicache(model, replace(rules, num_inference_steps=9))
    for states, time, text in inputs_of(9):
        states = torch.cat([states, states.sin()])
        output, expected = model(states, time, text), plain(states, time, text)
        assert (output - expected).norm() < 0.2 * expected.norm()
    records = [*get_stats(model).records()]
    assert {record.action for record in records} == {"compute", "resume", "reuse"}
