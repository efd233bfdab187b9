"""Hosts on one machine: namespaces, each with its own network address, root, HOME, /tmp, processes and sshd.

Only inside the world that run.sh makes; whatever a host starts or writes ends with it.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENV = Path(sys.prefix)
LOGS = ROOT / "build" / "cluster"
HOME, SHARED = "/home/me", "/shared/polyref"
BRIDGE, NETWORK = "br0", "10.77.0"

_NAMESPACES = ("--mount", "--pid", "--net", "--uts", "--ipc")
# Two things of real machines that are in the way: the machine's own name is a loopback address, as Debian has
# it, and another python comes first on the user's PATH.
_BECOME = """
set -e
mount --make-rprivate /
mkdir -p $PLACE
mount -t tmpfs -o size=4g tmpfs $PLACE
root=$PLACE/root
mkdir $PLACE/up $PLACE/work $root
mount -t overlay overlay -o lowerdir=/,upperdir=$PLACE/up,workdir=$PLACE/work $root
mount -t proc proc $root/proc
mount --rbind /sys $root/sys
mount --rbind /dev $root/dev
for folder in dev/shm tmp run home; do mount -t tmpfs -o size=4g tmpfs $root/$folder; done
for place in $NEEDED; do
  [ -e $root$place ] || { mkdir -p $root$place && mount --rbind $place $root$place; }
done
mkdir -p $root/run/sshd $root/shared/polyref
mount --bind $SHARED_FOLDER $root/shared/polyref
hostname $NAME
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' $NAME > $root/etc/hosts
sed -i "s#^\\(root:[^:]*:0:0:[^:]*\\):[^:]*:#\\1:$HOME_THERE:#" $root/etc/passwd
mkdir -p -m 700 $root$HOME_THERE $root$HOME_THERE/.ssh
echo "$PUBLIC_KEY" > $root$HOME_THERE/.ssh/authorized_keys
echo "export PATH=$BASE_PYTHON/bin:\\$PATH" > $root$HOME_THERE/.bashrc
ip link set lo up
exec chroot $root /usr/sbin/sshd -D -e -f /dev/null -o PidFile=none -o UsePAM=no \\
  -o PermitRootLogin=prohibit-password
"""


class Host:
    """One of them. `environment` is that of commands that are run there, not of those that come by ssh."""

    def __init__(self, number: int, name: str, shared: Path, public_key: str) -> None:
        """`number` ends its address on the world's bridge; it accepts ssh by the key, as root."""
        self.environment = {
            "HOME": HOME,
            "USER": "root",
            "PATH": f"{VENV / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
        }
        self.name, self.address = name, f"{NETWORK}.{number}"
        self._log = LOGS / f"{name}.log"
        environment = {
            "PATH": os.environ["PATH"],
            "PLACE": f"/tmp/hosts/{name}",
            "NAME": name,
            "HOME_THERE": HOME,
            "SHARED_FOLDER": str(shared),
            "BASE_PYTHON": sys.base_prefix,
            # Wherever they lie: a home, /tmp or a disk of their own is not in a host's root.
            "NEEDED": f"{ROOT} {VENV} {sys.base_prefix}",
            "PUBLIC_KEY": public_key,
        }
        command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "bash", "-c", _BECOME]
        self._process = self._begin(command, self._log, environment)
        self._until(
            lambda: os.readlink(f"/proc/{self._process.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        )
        self._plug_in(f"veth{number}")
        self._until(lambda: "Server listening" in self._log.read_text())

    def run(self, command: str, *, timeout: float = 60) -> tuple[int, str]:
        """A shell command in the user's HOME: its exit code, and all that it printed."""
        done = subprocess.run(
            self._inside(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """A shell command that goes on for long; what it prints is kept beside the host's log."""
        log = LOGS / f"{self.name}.{command.split()[1]}.log"
        return self._begin(self._inside(f"exec {command}"), log, None)

    def write(self, name: str, content: str) -> None:
        """A file in the user's HOME that nobody else may read."""
        command = f"mkdir -p $(dirname {name}) && umask 077 && cat > {name}"
        subprocess.run(self._inside(command), input=content, text=True, check=True)

    def processes(self) -> list[str]:
        """Command lines of all that runs there beside sshd."""
        _, listed = self.run("exec ps -e -o stat=,args=")
        lines = [line.split(maxsplit=1) for line in listed.splitlines()]
        return [args for state, args in lines if state[0] != "Z" and not ("sshd" in args or "ps -e" in args)]

    def end(self) -> None:
        """Kill it with all that runs there."""
        self._process.kill()
        self._process.wait()

    def _begin(
        self, command: list[str], log: Path, environment: dict[str, str] | None
    ) -> subprocess.Popen[bytes]:
        with log.open("w") as out:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C can be meant for all of it
            )

    def _inside(self, command: str) -> list[str]:
        init = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0]
        enter = ["nsenter", "--target", init, *_NAMESPACES, "--root", "--wd"]
        pairs = [f"{name}={value}" for name, value in self.environment.items()]
        return [*enter, "env", "-i", *pairs, "bash", "-c", f"cd {HOME}; {command}"]

    def _plug_in(self, cable: str) -> None:
        there = f"nsenter --target {self._process.pid} --net"
        for command in (
            f"ip link add {cable} type veth peer name eth0 netns {self._process.pid}",
            f"ip link set {cable} master {BRIDGE} up",
            f"{there} ip addr add {self.address}/24 dev eth0",
            f"{there} ip link set eth0 up",
        ):
            subprocess.run(shlex.split(command), check=True)

    def _until(self, met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not met():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)


def lay_bridge() -> None:
    """The cable channel that the hosts are plugged into."""
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "set", BRIDGE, "up"], check=True)


def succeeds(done: tuple[int, str]) -> str:
    """What a command printed that must not fail."""
    code, output = done
    assert code == 0, output
    return output


def until(met: Callable[[], bool], state: Callable[[], object]) -> None:
    """Wait for something that takes at most two minutes; `state` is shown if it does not come."""
    deadline = time.monotonic() + 120
    while not met():
        assert time.monotonic() < deadline, state()
        time.sleep(1)
