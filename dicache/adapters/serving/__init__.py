"""Plug-ins for serving engines, experimental: vLLM-Omni and SGLang. Importing this needs neither.

`vllm_omni` and `sglang` are what the engines' entry points call. `settings` makes a configuration
of what users write, `attach` puts the cache on the models of a pipeline and begins runs, `locate`
tells where calls stand, `table` has the engines' own transformer classes, which are not diffusers'.
"""
