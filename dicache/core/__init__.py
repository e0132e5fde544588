"""The algorithm: when a step is reused and how it is filled in. Knows torch, and no model.

`where` is what somebody who knows the model says of one call of it; `run` finds out from that which
step of which run it is; `gate` and `judge` decide; `trajectory` and `store` hold what is reused;
`step` and `session` are what others drive.
"""
