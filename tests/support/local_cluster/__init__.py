"""A real Kubernetes on this machine, for tests and for trying things out, without Docker.

A control plane needs no root: objects are stored, checked, scheduled and collected as anywhere, and
no container runs. A node beside it runs them, and needs root.

`binaries`, `programs` and `debian` provide the programs, once. `record` starts and ends them by way
of `processes`; `control_plane` starts a control plane. `node_cluster` starts one with a node, of
`sandbox` (namespaces), `containerd` with what `image_store` keeps, `node` and `volumes`. `api`
speaks to any cluster, and `testing` is for fixtures. `python -m local_cluster` is `make cluster-up`
and `cluster-down`.
"""
