"""A cluster as tests use it: through the real kubectl, and through its proxy where one call of
kubectl for each of many objects would take too long."""

import http.client
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from local_cluster.processes import Process, end_process, start_process, wait_until
from local_cluster.sandbox import NETWORK

PROXY_SECONDS = 30
# The server empties a definition that was just made in several tries, with pauses of up to a minute
# where its caches were not ready.
DELETE_SECONDS = 240


class Answer(NamedTuple):
    """What the API server answers: an HTTP status and an object."""

    status: int
    body: Any

    @property
    def message(self) -> str:
        """The reason of a refusal, in the server's words."""
        return str(self.body.get("message", ""))


class Cluster:
    """A cluster that a kubeconfig leads to. Close it, or use it as a context."""

    def __init__(self, kubeconfig: Path, kubectl: Path, scratch: Path) -> None:
        self.kubeconfig = kubeconfig
        self._kubectl = str(kubectl)
        # The cache and the preferences are the user's own: tests leave both alone.
        cache = {"KUBECACHEDIR": str(scratch / "kubectl"), "KUBERC": "off"}
        self._environment = {**os.environ, "KUBECONFIG": str(kubeconfig), **cache}
        # A node is on this machine, and no proxy leads there.
        direct = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy", ""), str(NETWORK)]
        self._environment["NO_PROXY"] = ",".join(filter(None, direct))
        self._log = scratch / "proxy.log"
        self._proxy: Process | None = None
        self._port = 0

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what the cluster's use has started."""
        if self._proxy is not None:
            end_process(self._proxy, patience_seconds=5)
            self._proxy = None

    def try_kubectl(
        self, *arguments: str, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl and return what it said, whether it succeeded or not."""
        return subprocess.run(
            [self._kubectl, *arguments],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl and return its output; raises AssertionError with its error if it fails."""
        done = self.try_kubectl(*arguments, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def delete(self, name: str) -> None:
        """Delete an object, if it is there, and wait until it is gone."""
        self.kubectl("delete", name, "--ignore-not-found", "--wait=false")

        def is_gone() -> bool:
            found = self.try_kubectl("get", name, "--ignore-not-found", "-o=name")
            return found.returncode == 0 and not found.stdout

        wait_until(
            is_gone,
            what=f"end of {name}",
            seconds=DELETE_SECONDS,
        )

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Answer:
        """Send one request to the API server and return its answer."""
        if self._proxy is None:
            self._start_proxy()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": content_type})
            response = connection.getresponse()
            return Answer(response.status, json.loads(response.read()))
        finally:
            connection.close()

    def _start_proxy(self) -> None:
        command = [self._kubectl, "proxy", "--port=0", f"--kubeconfig={self.kubeconfig}"]
        self._log.unlink(missing_ok=True)
        self._proxy = start_process("kubectl proxy", command, self._log, ends_with_parent=True)
        wait_until(self._found_port, what="proxy", seconds=PROXY_SECONDS, processes=[self._proxy])

    def _found_port(self) -> bool:
        found = re.search(r"Starting to serve on 127\.0\.0\.1:(\d+)\n", self._log.read_text())
        self._port = int(found[1]) if found else 0
        return found is not None
