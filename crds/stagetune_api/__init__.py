"""The contract between the client, the operator and the trainer.

Everything that crosses a border between programs is defined here once: the manifest (`spec`), what
a run reports about itself (`status`), what one trainer process is given (`stage`) and gives back
(`report`), how a folder of weights explains itself (`manifest`), and every name they share
(`names`). pydantic and the standard library only.
"""
