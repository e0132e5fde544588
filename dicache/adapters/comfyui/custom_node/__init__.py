"""A folder for ComfyUI's `custom_nodes`: link it there, or copy it."""

from dicache.adapters.comfyui.node import comfy_entrypoint as comfy_entrypoint
