"""ComfyUI: a node that caches a model's sampling runs, by ComfyUI's own patcher and nothing else.

Nothing is changed on a model: a clone of its patcher gets two wrappers, and the blocks' patches
live in the options of one call. Only `node` imports ComfyUI, and only ComfyUI imports `node`.
"""
