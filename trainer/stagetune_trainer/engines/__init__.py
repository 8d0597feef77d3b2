"""What takes a step where one process alone does not: one file per engine.

An engine takes over the parameters that a method opened and the optimizer that was built over them,
and gives the loop its `Update` and the checkpoints their `HeldTensors`.
"""
