"""The files that a node's programs are configured by, all in the folder `node` of its cluster."""

import json
from pathlib import Path
from typing import Any

POD_NETWORK = "10.244.0.0/24"
CLUSTER_DOMAIN = "cluster.local"
DNS_READY_PORT = 8181
PROXY_PORT = 10256
COREFILE = """\
{domain} in-addr.arpa ip6.arpa {{
    bind {address}
    errors
    ready {address}:{ready}
    kubernetes {domain} in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig}
    }}
}}

# No name outside is known, and a program that asks for one need not wait to learn that.
. {{
    bind {address}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""


def write_node_files(directory: Path, address: str, cgroup: str, node: str) -> None:
    """Write the files of the node of this name and address."""
    files = directory / "node"
    (files / "network").mkdir(parents=True)
    admin = directory / "kubeconfig.json"
    (files / "resolv.conf").write_text(f"nameserver {address}\n")
    (files / "Corefile").write_text(
        COREFILE.format(
            address=address, ready=DNS_READY_PORT, domain=CLUSTER_DOMAIN, kubeconfig=admin
        )
    )
    documents = {
        "kubelet.json": _kubelet(directory, address, cgroup),
        "proxy.json": _proxy(admin, address, node),
        "network/pods.conflist": _network(),
    }
    for name, document in documents.items():
        (files / name).write_text(json.dumps(document, indent=2) + "\n")


def _kubelet(directory: Path, address: str, cgroup: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": address,
        "authentication": {
            "anonymous": {"enabled": False},
            "x509": {"clientCAFile": str(directory / "keys/ca.crt")},
            "webhook": {"enabled": True},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        # Many machines that run tests still have version 1.
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [address],
        "resolvConf": str(directory / "node/resolv.conf"),
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "readOnlyPort": 0,
        # Nothing here may depend on how full the machine's disk is: no eviction, no removed image.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        # May be lower only with CAP_SYS_RESOURCE, and the machine's own programs come first.
        "oomScoreAdj": 0,
        # Tests wait for what the node reports.
        "nodeStatusUpdateFrequency": "2s",
        "syncFrequency": "10s",
        "maxPods": 64,
    }


def _proxy(kubeconfig: Path, address: str, node: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "hostnameOverride": node,
        "bindAddress": address,
        "healthzBindAddress": f"{address}:{PROXY_PORT}",
        "metricsBindAddress": f"{address}:10249",
        "clusterCIDR": POD_NETWORK,
        "oomScoreAdj": 0,
        # Limits of the whole machine, which are not this node's to set.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }


def _network() -> dict[str, Any]:
    """Pods on lines of their own and not on a bridge: what one pod sends to another is so routed,
    and comes by the rules of kube-proxy without the kernel's br_netfilter."""
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": POD_NETWORK}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": "/run/pod-addresses",
    }
    return {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{"type": "ptp", "ipam": addresses}],
    }
