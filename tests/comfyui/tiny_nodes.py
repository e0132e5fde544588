"""Nodes for workflows in a server of these tests, in the place of what would have to be downloaded.

ComfyUI loads this file like anybody's custom nodes.
"""

from tiny_comfy import make_model, prompt


class TinyModel:
    """A tiny model of a class whose files ComfyUI takes for its one published width.

    Flux has 24 heads of 128 channels wherever ComfyUI detects it, so that one block of it in a
    file has 0.3 GB.
    """

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"name": ("STRING", {})}}

    def load(self, name):
        return (make_model(name),)


class TinyPrompt:
    """A conditioning, without a text encoder."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"seed": ("INT", {}), "name": ("STRING", {}), "width": ("INT", {})}}

    def encode(self, seed, name, width):
        return (prompt(seed, name, width),)


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel, "TinyPrompt": TinyPrompt}
