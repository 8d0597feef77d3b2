"""A real Kubernetes control plane on this machine, for tests and for trying things out.

etcd, kube-apiserver, kube-controller-manager, kube-scheduler and kubectl, without root, Docker or
a node: objects are stored, checked, scheduled and collected as anywhere, and no container runs.
`binaries` builds the programs once; `control_plane` starts and stops them by way of `processes`;
`api` speaks to any cluster. `python -m local_cluster` is `make cluster-up` and `cluster-down`.
"""
