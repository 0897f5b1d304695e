"""Bounds on the outputs of a network over S(x): what no attack can exceed.

`intervals` propagates a box forward, `linear` propagates linear functions backward (CROWN, with
optimised slopes alpha-CROWN), and `branching` splits S(x) until a question is decided. All of them
run the network itself on an object that takes the place of its images, by `__torch_function__`.
"""
