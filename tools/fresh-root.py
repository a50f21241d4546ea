#!/usr/bin/env python3
"""Tries this repository as somebody does who has just installed Debian.

    fresh-root.py make RELEASE ROOT             a Debian (trixie, bookworm) in the folder ROOT, from this machine's mirror
    fresh-root.py run ROOT [OPTION]... COMMAND  runs COMMAND in a clone of this repository in there

COMMAND is a line for the shell. Options of `run`:
    --folder PATH   the clone, relative to the home folder (default: outboard); made from this clone's HEAD if absent
    --user          as a user with sudo and a password, not as root
    --terminal      on a terminal, where sudo may ask for that password
    --log FILE      keeps what was printed
    --lock FILE     takes a lock on FILE first (flock)

Run it as root; it needs mmdebstrap and the programs of util-linux. Rust is the one that rustup has installed for the user who runs this, with
what that user has of crates.io. After COMMAND it says how long nothing was printed at most. Its exit status is COMMAND's; 3 if something was
printed over sudo's question.
"""

import argparse
import fcntl
import os
import pathlib
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time

USER, PASSWORD = "newcomer", "correct horse"
# What a person has before the README: git for the clone, a C compiler as Rust's installer asks for it.
PACKAGES = "sudo,ca-certificates,git,gcc,libc6-dev"
PROMPT = re.compile(rb"\[sudo\] password for [^:]*: ?")
# How long a person looks at the question.
LOOK_S = 3.0


def mirrors():
    """The addresses of Debian and of its security updates in this machine's configuration of apt."""
    etc = pathlib.Path("/etc/apt")
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    addresses = re.findall(r"^(?:URIs:|deb(?:\s+\[[^]]*\])?)\s+(\S+/debian(?:-security)?/?)(?:\s|$)", text, re.M)
    main = next(address for address in addresses if "security" not in address)
    security = next((address for address in addresses if "security" in address), main.rstrip("/") + "-security")
    return main, security


def make(release, root):
    main, security = mirrors()
    sources = [f"deb {main} {release} main", f"deb {main} {release}-updates main", f"deb {security} {release}-security main"]
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={PACKAGES}", release, root, *sources]
    subprocess.run(command, check=True)
    # A network may have an authority of its own.
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", pathlib.Path(root, "etc/ssl/certs"))
    inside(root, f"useradd --create-home --shell /bin/bash --groups sudo {USER} && echo '{USER}:{PASSWORD}' | chpasswd")
    for home, owner in (("root", "root"), (f"home/{USER}", USER)):
        install_rust(pathlib.Path(root, home))
        inside(root, f"chown -R {owner}: '/{home}'")
        # As rustup installs it: with no target but the machine's own.
        others = 'rustup target list --installed | grep -v "^$(rustc --print host-tuple)$"'
        inside(root, f"{others} | xargs --no-run-if-empty rustup --quiet target remove", owner)


def install_rust(home):
    """The toolchain in use and the fetched crates of who runs this."""
    toolchain = pathlib.Path(subprocess.run(["rustc", "--print", "sysroot"], check=True, capture_output=True, text=True).stdout.strip())
    rustup = toolchain.parent.parent
    copy = home / ".rustup"
    shutil.copytree(toolchain, copy / "toolchains" / toolchain.name, symlinks=True)
    for name in ("settings.toml", "update-hashes"):
        if (rustup / name).is_dir():
            shutil.copytree(rustup / name, copy / name)
        else:
            shutil.copy(rustup / name, copy / name)
    cargo = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
    for name in ("bin", "registry", "config.toml"):
        if (cargo / name).is_dir():
            shutil.copytree(cargo / name, home / ".cargo" / name, symlinks=True)
        elif (cargo / name).exists():
            shutil.copy(cargo / name, home / ".cargo" / name)
    with open(home / ".profile", "a") as profile:
        profile.write('\nPATH="$HOME/.cargo/bin:$PATH"\n')


def inside(root, script, user="root"):
    """Runs a shell's script in the root, as a login of `user`."""
    subprocess.run(enter(root, script, user), check=True)


def enter(root, script, user):
    # The mounts and processes are gone with the last of these processes.
    mounts = (
        'mount --rbind /dev "$0/dev"; mount --rbind /sys "$0/sys"; mount -t proc proc "$0/proc"; '
        'rm -f "$0/etc/resolv.conf"; cp -L /etc/resolv.conf "$0/etc/resolv.conf"; '
        # The first that sudo looks for is the machine's own name.
        'echo "127.0.0.1 localhost $(hostname)" > "$0/etc/hosts"; '
        # Not -c: with that the user has no terminal that sudo could ask on.
        'exec chroot "$0" su - "$1" --session-command "$2"'
    )
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", mounts, root, user, script]


def clone(root, folder, user):
    home = "root" if user == "root" else f"home/{user}"
    place = pathlib.Path(root, home, folder)
    if not place.exists():
        here = pathlib.Path(__file__).resolve().parent.parent
        subprocess.run(["git", "clone", "--quiet", "--no-local", here, place], check=True)
        inside(root, f"chown -R {user}: {shlex.quote('/' + home)}")


def run(options):
    user = USER if options.user else "root"
    clone(options.root, options.folder, user)
    if options.lock:
        lock = open(options.lock, "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    command = enter(options.root, f"cd {shlex.quote(options.folder)} && {options.command}", user)
    log = open(options.log, "wb") if options.log else None
    if options.terminal:
        child, output = pty.fork()
        if child == 0:
            os.execvp(command[0], command)
    else:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        child, output = process.pid, process.stdout.fileno()
    silence, overwritten = watch(output, log)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"\nfresh-root: status {status}, longest silence {silence:.0f} s", flush=True)
    if overwritten:
        print(f"fresh-root: printed over sudo's question: {overwritten!r}")
        return 3
    return status


def watch(output, log):
    """Passes on what is printed, and answers sudo. The longest silence, and what was printed over a question."""
    longest, overwritten, recent, spoke = 0.0, b"", b"", time.monotonic()
    while True:
        data = read(output, None)
        if not data:
            return longest, overwritten
        longest, spoke = max(longest, time.monotonic() - spoke), time.monotonic()
        show(data, log)
        recent = (recent + data)[-500:]
        if PROMPT.search(recent):
            recent, until = b"", time.monotonic() + LOOK_S
            while (left := until - time.monotonic()) > 0:
                if more := read(output, left):
                    show(more, log)
                    overwritten += more
            os.write(output, PASSWORD.encode() + b"\n")


def read(output, seconds):
    """What is printed next, within `seconds`; nothing at the end."""
    if not select.select([output], [], [], seconds)[0]:
        return b""
    try:
        return os.read(output, 65536)
    except OSError:
        # A terminal whose last user has gone.
        return b""


def show(data, log):
    sys.stdout.buffer.write(data)
    sys.stdout.flush()
    if log:
        log.write(data)
        log.flush()


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    making = commands.add_parser("make")
    making.add_argument("release")
    making.add_argument("root")
    running = commands.add_parser("run")
    running.add_argument("root")
    running.add_argument("--folder", default="outboard")
    running.add_argument("--user", action="store_true")
    running.add_argument("--terminal", action="store_true")
    running.add_argument("--log")
    running.add_argument("--lock")
    running.add_argument("command")
    options = parser.parse_args()
    if options.what == "make":
        make(options.release, options.root)
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
