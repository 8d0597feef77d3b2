"""What builds an image without a registry: buildah, on a base that debootstrap makes.

buildah has a store of its own in the cache. The base is of the machine's own Debian, and packages
come from where the machine's pip and uv take theirs.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import ssl
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from local_cluster.binaries import BinariesUnavailableError, cache_directory

BASE_VARIABLE = "STAGETUNE_TEST_BASE_IMAGE"
"""Names an image to build upon that can be pulled; without it debootstrap makes one."""
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
NOT_IN_BASE = (
    # What debootstrap takes over from this machine, then what nobody reads in an image.
    *("etc/apt/sources.list", "etc/resolv.conf", "etc/hostname", "var/log/bootstrap.log"),
    *("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"),
)
INDEX_VARIABLE = re.compile(
    "(UV|PIP)_(DEFAULT_INDEX|INDEX|INDEX_URL|EXTRA_INDEX_URL|INSECURE_HOST|TRUSTED_HOST"
    "|HTTP_TIMEOUT|DEFAULT_TIMEOUT)|UV_INDEX_[A-Z0-9_]+_(USERNAME|PASSWORD)"
)
STEP_SECONDS = 3600
UV_CACHE = "/run/uv-cache"

Tell = Callable[[str], None]


class ImagesUnavailableError(BinariesUnavailableError):
    """This machine has no images and cannot build them; the text says why and what helps."""


def read_settings() -> dict[str, str]:
    """Return where this machine's pip and uv take packages from, as environment variables."""
    found = {name: value for name, value in os.environ.items() if INDEX_VARIABLE.fullmatch(name)}
    pip = shutil.which("pip3") or shutil.which("pip")
    listed = _try([pip, "config", "list"]).stdout if pip else ""
    for name, value in re.findall(r"^\w+\.((?:extra-)?index-url)='(.*)'$", listed, re.MULTILINE):
        found.setdefault(f"PIP_{name.replace('-', '_').upper()}", value)
    if "PIP_INDEX_URL" in found and not {"UV_INDEX_URL", "UV_DEFAULT_INDEX"} & found.keys():
        found["UV_DEFAULT_INDEX"] = found["PIP_INDEX_URL"]
    if "PIP_EXTRA_INDEX_URL" in found and not {"UV_EXTRA_INDEX_URL", "UV_INDEX"} & found.keys():
        found["UV_INDEX"] = found["PIP_EXTRA_INDEX_URL"]
    return found


def format_settings() -> str:
    """Return the settings as the Dockerfiles read them from the secret `build-env`."""
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in read_settings().items()]
    return "".join(lines)


def buildah_command() -> list[str]:
    """Return how buildah is called upon the store in the cache; hold `images.lock` meanwhile."""
    store = cache_directory() / "containers"
    return ["buildah", f"--root={store}", f"--runroot={store / 'run'}"]


class Builder:
    """buildah with a store that nothing else uses."""

    def __init__(self, scratch: Path, lock: int) -> None:
        self._scratch = scratch
        self._lock = lock
        self._command = buildah_command()
        self._install_programs()
        tried = _try([*self._command, "--storage-driver=overlay", "images"])
        # Without overlay every layer is a whole copy.
        self._command.append(f"--storage-driver={'overlay' if tried.returncode == 0 else 'vfs'}")
        # What an interrupted build left: no other can be under way, for the lock is held.
        self.run("rm", "--all")

    def run(self, *arguments: str) -> str:
        """Run buildah and return its output."""
        return self._run([*self._command, *arguments])

    def build(self, recipe: Path, name: str, base: str) -> None:
        """Build an image of a Dockerfile and what lies beside it, upon `base`, and name it.

        Its layers stay, and what did not change is taken from them.
        """
        cache = Path(os.environ.get("UV_CACHE_DIR") or cache_directory().parent / "uv")
        cache.mkdir(parents=True, exist_ok=True)
        secrets = {"build-env": self._scratch / "build-env"}
        secrets["build-env"].write_text(format_settings() + f"UV_CACHE_DIR={UV_CACHE}\n")
        authorities = os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile
        if authorities is not None:
            secrets["ca-bundle"] = Path(authorities)
        self.run(
            *("build", "--layers", "--isolation=chroot", "--network=host", "--format=oci"),
            *(f"--secret=id={secret},src={path}" for secret, path in secrets.items()),
            *(f"--build-arg=BASE_IMAGE={base}", f"--volume={cache}:{UV_CACHE}"),
            *("--file", str(recipe), f"--tag={name}", str(recipe.parent)),
        )

    def provide_base(self, tell: Tell) -> str:
        """Return the name of a base of this machine's Debian release, made where it is missing."""
        lines = _try(["apt-get", "indextargets", "--format=$(RELEASE) $(REPO_URI) $(COMPONENT)"])
        sources = [line.split() for line in lines.stdout.splitlines()]
        release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
        mirrors = [mirror for name, mirror, _ in sources if name == release]
        components = sorted({component for name, _, component in sources if name == release})
        if not mirrors:
            raise ImagesUnavailableError(
                f"apt has no source of the release {release!r} to make a base image of; set "
                f"{BASE_VARIABLE} to an image with Python 3.11 or newer that can be pulled"
            )
        key = hashlib.sha256(repr((BASE_PACKAGES, NOT_IN_BASE)).encode()).hexdigest()[:12]
        name = f"localhost/stagetune-base:{release}-{key}"
        if name not in self.run("images", "--format={{.Name}}:{{.Tag}}").split():
            tell(f"making a base image of {release}")
            container = self.run("from", "scratch").strip()
            root = Path(self.run("mount", container).strip())
            # In a name space of its own, so that no mount of it is left however it ends.
            command = ["unshare", "--mount", "debootstrap", "--variant=minbase"]
            command += [f"--include={BASE_PACKAGES}", f"--components={','.join(components)}"]
            self._prepare([*command, release, str(root), mirrors[0]])
            for path in (root / name for name in NOT_IN_BASE):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self.run("commit", "--rm", "--format=oci", container, name)
        return name

    def _install_programs(self) -> None:
        if shutil.which("buildah") and shutil.which("debootstrap"):
            return
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise ImagesUnavailableError(
                "building the images takes root, buildah and debootstrap; as root, run "
                "`apt-get install buildah debootstrap`"
            )
        self._prepare(["apt-get", "update"])
        install = ["apt-get", "install", "--yes", "--no-install-recommends"]
        self._prepare([*install, "buildah", "debootstrap"])

    def _prepare(self, command: list[str]) -> None:
        try:
            self._run(command)
        except subprocess.CalledProcessError as error:
            raise ImagesUnavailableError(
                f"{' '.join(command)} failed: {' '.join(error.__notes__)}; it takes the package "
                f"mirrors of this machine's apt sources"
            ) from error

    def _run(self, command: Sequence[str]) -> str:
        """Run a program that keeps the lock for as long as it lives; return its output."""
        done = _try(command, self._lock, {"TMPDIR": str(self._scratch)})
        if done.returncode != 0:
            error = subprocess.CalledProcessError(done.returncode, command)
            error.add_note("\n".join(done.stderr.splitlines()[-15:]))
            raise error
        return done.stdout


def _try(
    command: Sequence[str], lock: int | None = None, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(variables or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=STEP_SECONDS,
        pass_fds=[] if lock is None else [lock],
    )
