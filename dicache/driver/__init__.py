"""A session inside any torch model: between the model's caller, its blocks and the cache.

`model.CachedModel` is put on a model and taken off again. `families` says where a model's blocks
are and what they carry, `call` is what is known of the call that runs, `conditions` what of its
arguments the probe does not see. `blocks` stands between the model and each of its blocks,
`bypass` leaves blocks out of their lists, `samples` runs a part of a batch, `streams` makes one
tensor of several, `parallel` finds the ranks that run the blocks with us, `compiling` knows
torch.compile's inside. Nothing here knows a framework: an adapter tells where a call stands.
"""
