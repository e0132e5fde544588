"""diffusers: pipelines and transformers of its classes. Importing this imports no diffusers yet.

`attach` has the verbs, `table` the families. A `site` is what all features on a transformer share:
its place in diffusers' hooks, and one `locate`, which tells where a call stands from what a
pipeline's `schedule` and the call's own arguments and adapters (`conditioning`) show.
"""
