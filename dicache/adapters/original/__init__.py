"""The original code of HunyuanVideo, Wan 2.1 and Wan 2.2, found by module and class.

No diffusers is imported: these repositories pin versions that lack what our other adapter needs.
`holder` finds the models in what users have at hand, `table` has their rows, `locate` tells where
their calls stand, `attach` has the verbs.
"""
