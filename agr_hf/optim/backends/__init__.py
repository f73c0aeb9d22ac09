"""How an update is computed on a device: the only modules that call private torch functions.

`multi_tensor` names torch's operations over lists of tensors, in which every rule is written once.
`cpu` cuts tensors into cache-sized blocks and knows torch's fused CPU kernel of Adam.
A backend computes the same update faster. It never has a feature of its own.
"""
