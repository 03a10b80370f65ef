#!/usr/bin/env python3
"""HAS - Higher Availability Service: players stay connected while their MUSH is away.

HAS stands between players and a MUSH (a text game server, reached by telnet).
Players connect to HAS as if it were the MUSH, and HAS opens one connection to
the MUSH for each of them. When the MUSH goes away (crash, restart, reboot of
its host, move to another machine) the players stay connected to HAS, are
told, and are logged back in when it returns.

    client --(client stream)-- session --(link)-- world       one session a player
                                  ^
                     heartbeat ---+  a logged-in character on its own thread:
                                     is the world alive? is this password right?

Words, used alike in the code, the log, has.conf and the README: client (an
accepted connection), user (a person), world (the game behind HAS), link (one
HAS-to-world connection of a session), session (client + link + what is
remembered), dialect (server family), heartbeat, probe (liveness question),
check (password question), verdict (the answer), mark (a random line HAS sends
itself and removes from the output), notice (a line HAS writes to a user),
listener, hub (the main loop), mailbox (the one way between threads).

The parts, in reading order; each uses only the parts above it:

    1. Settings       the constants you edit, how they are read and checked
    2. Telnet         bytes to text and commands; what was negotiated
    3. Dialects       the server families: how each reads lines, logs in, is asked
    4. Logins         which login took, and what becomes of it
    5. Wire           the way between threads, and one non-blocking socket
    6. Session        one user: every rule a user can see
    7. Heartbeat      the thread that watches the world and checks passwords
    8. Health         what is known of the world, from what was heard of it
    9. Hub            the main loop: who is let in, whose link is next, what admins ask
    10. Survival      what a new process takes over; the processes beside the worker
    11. Command line  arguments, log, signals, exit status

Two processes, where the system can (Keeper): the worker does all, the other only holds what must
outlive it, and starts the next. Where TLS is asked for, a third speaks it, and nothing else
(TLSFront): the worker sends and receives plain text, and its users in TLS outlive it like all.

Two threads: the main thread runs the hub, owns every session and never
blocks; the heartbeat thread owns the one blocking connection and every DNS
look-up. They share nothing but two mailboxes, one each way. (While users are
served, the name of another world is looked up by a thread that lives only for
that, and posts to the heartbeat's mailbox: nobody's verdict waits for DNS.)

For up to half a minute another small process runs a command of on_event (GUARD).

Signals: HUP reads the settings again (a changed mush_address moves everybody
once the new world is confirmed) and opens log_file anew, USR1 writes the
status to the log, USR2 upgrades to the has.py on disk without dropping
anybody, TERM and INT say goodbye and stop.
"""
import argparse
import ast
import base64
import binascii
import codecs
import collections
import contextlib
import difflib
import enum
import errno
import functools
import gc
import hashlib
import heapq
import ipaddress
import itertools
import json
import logging
import math
import mmap
import operator
import os
import pathlib
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
import unicodedata

try:
    import fcntl
    import termios
except ImportError:
    fcntl = termios = None
try:
    import resource
except ImportError:
    resource = None
try:
    import ssl
except ImportError:                             # no TLS; said when it is asked for
    ssl = None
if sys.version_info < (3, 8):
    sys.exit(f"has.py: HAS needs Python 3.8 or newer, and this is {sys.version.split()[0]}")

# ---- BEGIN CONFIGURATION: edit these, then `kill -HUP` the running HAS ----
MUSH_ADDRESS = "127.0.0.1:4096"   # the MUSH: host:port, [v6]:port or unix:/path; several: commas
HB_USER = "heartbeat"             # the heartbeat character: its name
HB_PASS = "heartbeat"             # and its password
LOCAL_PORT = 4201                 # port to listen on; 0: none, if there is one for TLS, else any
LOCAL_PORT_SSL = 0                # port to listen on for TLS; 0: none
SSL_CERT = ""                     # file with the certificate (and its chain) for that port
SSL_KEY = ""                      # file with its key, not encrypted; empty: in the same file
ON_EVENT = ""                     # command run when the world goes down, comes up ...; no shell
ADMINS = ""                       # characters that may type #? for the list of sessions; commas
LOG_FILE = ""                     # file for the log; empty: standard error
OFFLINE_NOTICE = "# NOTICE # This world is OFFLINE. Please wait till it returns."
ONLINE_NOTICE = "# NOTICE # This world is ONLINE again."
# The rest is right as it is for nearly everybody; has.conf says more of each.
MUSH_TYPE = "auto"                # teenymush, pennmush, tinymush, tinymux, rhostmush or plain
MUSH_SSL = "no"                   # speak TLS to the MUSH
MUSH_SSL_VERIFY = "yes"           # and check its certificate
MUSH_SSL_CA = ""                  # file with certificates to check it against; empty: the system's
REMOTEHOSTNAME_CMD = "auto"       # how the MUSH is told a user's address: auto, none or a word
ADD_EPOCH_TIME = "yes"            # with it, the time the user first connected (TeenyMUSH)
BEAT = 10                         # seconds between probes
RETRY = 1                         # at most these seconds between tries to reach a lost world
HB_TIMEOUT = 10                   # seconds without an answer until the world counts as silent
DEAD_AFTER = 60                   # seconds of silence on open connections until it counts as down
FAILOVER_AFTER = 60               # seconds down until the next address is tried; 0: only by HUP
FAILBACK_AFTER = 0                # seconds the first must answer to be returned to; 0: never
LOCAL_ADDRESS = ""                # address to listen on; empty: all, IPv4 and IPv6
PROXY_FROM = ""                   # addresses of your nginx, stunnel or haproxy (PROXY lines)
DENY = ""                         # addresses and networks that are let in no more
MAX_CLIENTS = 1000                # clients at the same time; 0: no limit
MAX_PER_HOST = 50                 # of these from one address (IPv6: from one /64); 0: no limit
STILL_OFFLINE_EVERY = 300         # seconds: who waits is told this often for how long; 0: never
LOGIN_HOLD = 300                  # seconds to hold a client without login in an outage; 0: for ever
HOLD = 0                          # the same for a client with a login
RESUME_RATE = "auto"              # users brought back per second: auto or a number, 0: all at once
REATTACH = 0                      # seconds a user's place is kept when his line drops; 0: never
REATTACH_LIMIT = 131072           # bytes of what he missed that are kept for him
OUTPUT_LIMIT = 1048576            # bytes held for a client that does not read
CONTROL_SOCKET = ""               # unix socket for --status; empty: has.sock beside has.conf
KEEPER = "auto"                   # a process that outlives a kill of HAS: auto or no
LOG_LEVEL = "info"                # debug, info, warning or error
# What users read; has.conf says when. {words} in braces are filled in.
MOVED_NOTICE = "# NOTICE # This world is moving to another machine. One moment, please."
SILENT_NOTICE = "# NOTICE # This world does not answer just now. You stay connected."
UNSENT_NOTICE = "# NOTICE # This world is OFFLINE. Not sent:"
UNSENT_MORE_NOTICE = "(and {lines} lines more)"
STILL_OFFLINE_NOTICE = "# NOTICE # This world has been OFFLINE for {time}. Still waiting."
MAINTENANCE_NOTICE = "# NOTICE # {text}"
LOGIN_KEPT_NOTICE = "# NOTICE # You will be logged in when the world returns."
HOLD_OVER_NOTICE = "# NOTICE # The world is still offline. Please come back later."
RELOGIN_FAILED_NOTICE = "# NOTICE # This world is back but did not take your login. Please log in."
GUEST_NOTICE = "# NOTICE # This world is ONLINE again. Guests have to log in again."
SUSPECT_NOTICE = ("# NOTICE # The world died each time your login was repeated. "
                  "Please log in yourself.")
REATTACH_NOTICE = "# NOTICE # Welcome back: your place was kept for {time}."
REATTACH_FROM_NOTICE = "# NOTICE # Your line was lost at {old}; you are back from {new}."
REATTACH_DOUBTFUL_NOTICE = "# NOTICE # Perhaps you saw these:"
REATTACH_MISSED_NOTICE = "# NOTICE # You missed {lines} line(s):"
REATTACH_LOST_NOTICE = "# NOTICE # Of what you missed the first {lines} line(s) are lost."
REATTACH_END_NOTICE = "# NOTICE # That is all. You are back."
REATTACH_ELSEWHERE_NOTICE = "# NOTICE # Your session goes on at {address}."
LOGIN_BRAKE_NOTICE = ("# NOTICE # Too many logins were tried from your address: "
                      "yours goes on in {seconds} s.")
TOO_LONG_NOTICE = "# NOTICE # That line is too long."
UNREADABLE_NOTICE = "# NOTICE # This world cannot read that line."
FULL_NOTICE = "# NOTICE # Too many users are connected now. Please try again later."
FULL_HOST_NOTICE = "# NOTICE # Too many connections from your address."
DENIED_NOTICE = "# NOTICE # This world takes no connections from your address."
KICKED_NOTICE = "# NOTICE # You were disconnected by an administrator."
KICK_REASON_NOTICE = "# NOTICE # Reason: {reason}"
GOODBYE_NOTICE = "# NOTICE # The front end of this world is going down. Goodbye."
OUTPUT_LOST_NOTICE = "<output lost: {lines} lines>"
ARE_YOU_THERE_NOTICE = "[Yes]"
LIST_HEADING_NOTICE = "id name address state age idle in out tls size"
# ---- END CONFIGURATION ----

VERSION = "1.0"
log = logging.getLogger("has")


# ======================================================================
# 1. Settings
#
# The block of constants above is read as data, never executed, at start and
# at every HUP; has.conf, if there is one, wins over it. Nothing takes effect
# unless everything is right, and all that is wrong is reported together.
# ======================================================================

BEGIN_MARK, END_MARK = "# ---- BEGIN CONFIGURATION", "# ---- END CONFIGURATION"
FAMILIES = ("teenymush", "pennmush", "tinymush", "tinymux", "rhostmush", "plain")

Address = collections.namedtuple("Address", "host port path")
Address.__doc__ = "Where a world is: host and port, or (host None) the path of a unix socket."
Address.__str__ = lambda self: (
    f"unix:{self.path}" if self.path else
    f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


class SettingsError(Exception):
    """The settings cannot be used; `problems` holds one line of text for each reason."""

    def __init__(self, problems):
        self.problems = [_readable(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


def _readable(problem, most=1000):
    """A problem in one line that fits a screen: it may quote a file that is no has.conf at all."""
    problem = re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", "?", problem)
    return problem if len(problem) <= most else (
        f"{problem[:most // 2]} (and so on) {problem[-most // 2:]}")


# sun_path, with a NUL behind it (unix(7))
LONGEST_UNIX_PATH = 107 if sys.platform.startswith("linux") else 103


def parse_address(text):
    """A world's address: host:port, [v6]:port or unix:/path; ValueError says what is wrong."""
    if text.startswith("unix:"):
        if not text.startswith("unix:/") or not hasattr(socket, "AF_UNIX"):
            raise ValueError("a unix socket needs a full path: unix:/path/to/netmush.sock")
        if len(os.fsencode(text[5:])) > LONGEST_UNIX_PATH or "\0" in text:
            raise ValueError("the path of a unix socket may have "
                             f"{LONGEST_UNIX_PATH} bytes, and no NUL")
        return Address(None, 0, text[5:])
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):(\d{1,5})", text)
    if not match or not 0 < int(match.group(3)) < 65536:
        raise ValueError(f"{text!r} is not host:port, [v6]:port or unix:/path "
                         "with a port from 1 to 65535")
    _check_host(match.group(1), match.group(2))
    return Address(match.group(1) or match.group(2), int(match.group(3)), None)


def _is_numeric(host):
    """Whether a host is an address, so that nothing has to be looked up."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_host(in_brackets, name):
    """ValueError for a host that no resolver could take (RFC 1035 2.3.4, 3986 3.2.2)."""
    if in_brackets or re.fullmatch(r"[0-9.]+", name):
        try:
            (ipaddress.IPv6Address if in_brackets else ipaddress.IPv4Address)(in_brackets or name)
        except ValueError:
            raise ValueError(f"{in_brackets or name!r} is no IPv{6 if in_brackets else 4} address"
                             ) from None
        return
    labels = (name[:-1] if name.endswith(".") else name).split(".")
    if len(name) > 253 or not all(0 < len(label) < 64 for label in labels):
        raise ValueError(f"{name!r} is no host name: a part between its dots is empty, "
                         "or something is too long")


def _addresses(text):
    found = [parse_address(part.strip()) for part in text.split(",") if part.strip()]
    if not found:
        raise ValueError("names no address: write host:port")
    if len(set(found)) < len(found):
        raise ValueError("names the same address twice")
    return found


def _number(low, high, kind=int):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if not low <= value <= high:
            raise ValueError(f"is not between {low} and {high}")
        return value
    return parse


def _checked(is_right, otherwise, value=str):
    """A reader of texts for which `is_right` holds; `value` makes the setting of them."""
    def parse(text):
        if not is_right(text):
            raise ValueError(otherwise)
        return value(text)
    return parse


def _choice(*words):
    return _checked(lambda text: text.lower() in words, f"is not one of {', '.join(words)}",
                    str.lower)


def _names(text):
    return [part.strip().lower() for part in text.split(",") if part.strip()]


def address_of(text):
    """The value of a numeric address, no %scope; IPv4 in IPv6 (RFC 4291 2.5.5.2) is IPv4."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _local_address(text):
    if not text:
        return text
    scoped = ipaddress.ip_address(text).version == 6 and "%" in text    # its error says enough
    return text if scoped else str(address_of(text))


def _network(text):
    network = ipaddress.ip_network(text, strict=False)
    if ipaddress.ip_interface(text).ip != network.network_address:
        raise ValueError(f"{text} is one address in a network: for all of it write {network}")
    first, bits = address_of(str(network.network_address)), network.prefixlen - 96
    mapped = first.version < network.version and bits >= 0
    return ipaddress.ip_network(f"{first}/{bits}") if mapped else network


def _networks(text):
    return [_network(part) for part in re.split(r"[,\s]+", text.strip()) if part]


def _rate(text):
    try:
        return None if text.lower() == "auto" else _number(0, 100000, float)(text)
    except ValueError as error:
        raise ValueError(f"{error}, nor auto") from None


def _command_word(text):
    return text.lower() if text.lower() in ("auto", "none") else _word(text)


def _program(text):
    """A command line as its words: quotes hold them together, and no shell expands anything."""
    if "\0" in text:
        raise ValueError("holds control characters")
    words = shlex.split(text)
    if words and ("/" in words[0] or not words[0]) and not os.path.isabs(words[0]):
        raise ValueError("begins with no program: give its full path, or its name in the PATH")
    return words


def _notice(*known):
    """A reader of texts for users, in which these are filled in, nothing else: see filled()."""
    def parse(text):
        if re.search(r"[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f\ud800-\udfff]", text):
            raise ValueError("holds control characters")
        for word in _PLACEHOLDER.findall(text):
            if word not in known:
                filled_in = " and ".join(f"{{{it}}}" for it in known)
                raise ValueError(f"there is no {{{word}}} in this notice: {filled_in or 'nothing'} "
                                 f"{'are' if len(known) > 1 else 'is'} filled in")
        return text
    return parse


_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def filled(notice, **values):
    """A notice of the settings with its {placeholder} filled in."""
    return _PLACEHOLDER.sub(lambda it: str(values[it.group(1)]), notice)


_YES, _NO = ("yes", "true", "1", "on"), ("no", "false", "0", "off")
_yes_or_no = _checked(lambda text: text.lower() in _YES + _NO, "is neither yes nor no",
                      lambda text: text.lower() in _YES)
_file = _checked(lambda text: not text or os.path.isfile(text), "there is no such file")
_word = _checked(re.compile(r"[^\s\x00-\x1f\x7f]+").fullmatch, "must be one word without blanks")
_name = _checked(re.compile(r'(?=.*\S)[^\x00-\x1f\x7f"]+').fullmatch, "must be a character's name")
_path = _checked(re.compile(r"[^\x00-\x1f\x7f]*").fullmatch, "holds control characters")
_headings = _checked(lambda text: len(text.split()) == 10,
                     "must be ten words, one for each column", _notice())
_seconds = _number(0, 10 ** 8, float)
_interval = _number(0.05, 10 ** 6, float)
SETTINGS = {
    "mush_address": _addresses, "mush_type": _choice("auto", *FAMILIES),
    "mush_ssl": _yes_or_no, "mush_ssl_verify": _yes_or_no, "mush_ssl_ca": _file,
    "local_address": _local_address, "local_port": _number(0, 65535),
    "local_port_ssl": _number(0, 65535), "ssl_cert": _file, "ssl_key": _file,
    "proxy_from": _networks, "deny": _networks, "admins": _names, "control_socket": _path,
    "on_event": _program, "keeper": _choice("auto", "no"),
    "hb_user": _name, "hb_pass": _word, "beat": _interval, "retry": _interval,
    "hb_timeout": _interval, "dead_after": _interval,
    "failover_after": _seconds, "failback_after": _seconds,
    "remotehostname_cmd": _command_word, "add_epoch_time": _yes_or_no, "resume_rate": _rate,
    "still_offline_every": _seconds, "login_hold": _seconds, "hold": _seconds,
    "max_clients": _number(0, 10 ** 6), "max_per_host": _number(0, 10 ** 6),
    "output_limit": _number(4096, 1 << 30),
    "reattach": _seconds, "reattach_limit": _number(4096, 1 << 24),
    "log_file": _path, "log_level": _choice("debug", "info", "warning", "error"),
    **{f"{name}_notice": _notice() for name in (
        "offline", "online", "moved", "silent", "unsent", "relogin_failed", "suspect", "guest",
        "login_kept", "hold_over", "too_long", "unreadable", "reattach_doubtful", "reattach_end",
        "full", "full_host", "kicked", "denied", "goodbye", "are_you_there")},
    **{f"{name}_notice": _notice(*words) for name, *words in (
        ("reattach", "time"), ("reattach_from", "old", "new"), ("reattach_missed", "lines"),
        ("reattach_lost", "lines"), ("reattach_elsewhere", "address"), ("unsent_more", "lines"),
        ("still_offline", "time"), ("maintenance", "text"), ("login_brake", "seconds"),
        ("kick_reason", "reason"), ("output_lost", "lines"))},
    "list_heading_notice": _headings,
}
TLS_KEYS = {"server": ("ssl_cert", "ssl_key"), "world": ("mush_ssl_verify", "mush_ssl_ca")}
CERTIFICATES = ("mush_ssl_ca", "ssl_cert", "ssl_key")
PATHS = CERTIFICATES + ("control_socket", "log_file")


class Recipe:
    """What the TLS context of a role is made of, in whatever process: the values of its TLS_KEYS,
    and what the files they name hold ({key: content}), as far as that was read."""

    def __init__(self, role, values, files):
        self.role, self.values, self.files = role, [values[key] for key in TLS_KEYS[role]], files

    @functools.cached_property
    def name(self):
        """Another one has another."""
        files = [self.files.get(key) for key in TLS_KEYS[self.role]]
        return hashlib.sha256(repr((self.role, self.values, files)).encode()).hexdigest()[:16]

    def __eq__(self, other):
        return isinstance(other, Recipe) and self.name == other.name

    __hash__ = None

    def context(self):
        """The context; ValueError says why there is none."""
        make = {"server": server_context, "world": world_context}[self.role]
        return make(*self.values, self.files)


class Settings:
    """All settings: an attribute for each key of SETTINGS, and the TLS contexts. Never changed.

    `texts` holds {key: text} as it was read, `files` {key: content} of the certificates in use:
    from both the settings can be made again, whatever has become of the files. `conf` is the
    has.conf that sets some of them, or "". ValueError where TLS is asked for and cannot be had.
    """

    def __init__(self, values, texts, files=None, conf=""):
        files = {} if files is None else files
        self.__dict__.update(values, texts=texts, files=files, conf=conf)
        self.recipes = {role: Recipe(role, values, files) for role in TLS_KEYS}
        self.server_tls = self.recipes["server"].context() if self.local_port_ssl else None
        self.world_tls = self.recipes["world"].context() if self.mush_ssl else None

    def __repr__(self):
        return f"Settings({', '.join(sorted(SETTINGS))})"       # no values: hb_pass is one


def _tuned(context):
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # an end of file without close_notify is one: OpenSSL 3 would cut off the other direction, too
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    # a client that asks for new keys over and over costs a handshake each time
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    return context


def tls_reason(error):
    """Why TLS failed, in OpenSSL's words; what is wrong with a certificate it does not believe."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    detail = getattr(error, "verify_message", None)
    return f"{reason}: {detail.rstrip('.')}" if detail else reason


MEMORY_FILES = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


def memory_file(content):
    """A descriptor of a new file in memory, for what must not touch the disk."""
    fd = os.memfd_create("has")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


def read_memory_file(fd):
    """All of a memory file, wherever its position is."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def memory_path(fd):
    """A path by which this process, and one that inherits `fd`, can open the memory file anew."""
    return f"/proc/self/fd/{fd}"


@contextlib.contextmanager
def _path_of_certificate(key, path, files):
    """A path at which OpenSSL, which takes paths only, reads what `files` holds under `key`: what
    stands at `path` now, or stood there when the settings were read in the first place."""
    if key not in files:
        with open(path, "rb") as file:
            files[key] = file.read()
    if not MEMORY_FILES:
        yield path
        return
    fd = memory_file(files[key])
    try:
        yield memory_path(fd)
    finally:
        os.close(fd)


def server_context(cert, key, files):
    """The TLS context of the local_port_ssl listener; ValueError says what is wrong with it."""
    if ssl is None:
        raise ValueError("local_port_ssl: this Python has no ssl module")
    if not cert:
        raise ValueError("local_port_ssl needs ssl_cert")
    key = key or cert
    context = _tuned(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def no_prompt():
        raise ValueError(f"ssl_key {key}: is encrypted, "
                         "and HAS must start without being asked: decrypt it")
    try:
        with _path_of_certificate("ssl_cert", cert, files) as cert_path, \
                _path_of_certificate("ssl_key", key, files) as key_path:
            context.load_cert_chain(cert_path, key_path, no_prompt)
    except OSError as error:                    # ssl.SSLError is one
        raise ValueError(f"ssl_cert {cert}, ssl_key {key}: no usable pair: {tls_reason(error)}"
                         ) from None
    return context


def world_context(verify, ca_file, files):
    """The TLS context of links to the world."""
    if ssl is None:
        raise ValueError("mush_ssl: this Python has no ssl module")
    try:
        if ca_file:
            with _path_of_certificate("mush_ssl_ca", ca_file, files) as path:
                context = _tuned(ssl.create_default_context(cafile=path))
            # Python 3.13 refuses what openssl req made for years (no key usage)
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        else:
            context = _tuned(ssl.create_default_context())
    except OSError as error:
        raise ValueError(f"mush_ssl_ca {ca_file}: holds no usable certificate: "
                         f"{tls_reason(error)}") from None
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _lines_of(path):
    """The lines of a file in UTF-8, whatever the locale; UnicodeDecodeError if it is none. Never
    waits: a pipe, which nobody may fill, is an OSError."""
    def opener(path, flags):
        return os.open(path, flags | os.O_NONBLOCK)
    with open(path, encoding="utf-8-sig", opener=opener) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no ordinary file", path)
        return file.read().split("\n")


def _cannot_be_read(path, error):
    """A problem: why `path` gives no lines, and the place in it where that can be told."""
    if not isinstance(error, UnicodeDecodeError):
        return f"{path}: cannot be read: {error}"
    before = re.split("\r\n?|\n", error.object[:error.start].decode("utf-8-sig"))
    return (f"{path}:{len(before)}: column {len(before[-1]) + 1}: the byte "
            f"0x{error.object[error.start]:02x} is not UTF-8: save it as UTF-8")


def read_constants(path):
    """Read the block of constants in the has.py at `path` as data, never executed.

    Returns ({key: (text, "file:line")}, problems).
    """
    try:
        lines = _lines_of(path)
    except (OSError, ValueError) as error:
        return {}, [_cannot_be_read(path, error)]
    begin, end = ([n for n, line in enumerate(lines) if line.startswith(mark)]
                  for mark in (BEGIN_MARK, END_MARK))
    if len(begin) != 1 or len(end) != 1 or end[0] < begin[0]:
        return {}, [f"{path}: the lines {BEGIN_MARK!r} and {END_MARK!r} must stand there "
                    "once each: put them back"]
    try:
        tree = ast.parse("\n" * begin[0] + "\n".join(lines[begin[0]:end[0]]) + "\n")
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL, before 3.12
        where, why = getattr(error, "lineno", begin[0] + 1), getattr(error, "msg", error)
        return {}, [f"{path}:{where}: this is no Python constant: {why}"]
    return _constants_of(tree, path)


def _constants_of(tree, path):
    found, problems = {}, []
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        try:
            (target,), value = node.targets, ast.literal_eval(node.value)
            if not isinstance(value, (int, float, str)) or not target.id.isupper():
                raise ValueError
        except (AttributeError, ValueError, TypeError):
            problems.append(f'{where}: only lines like NAME = "text" or NAME = 123 may stand here')
        else:
            _put_down(found, problems, (target.id.lower(), target.id), str(value), where)
    return found, problems


def _put_down(found, problems, names, text, where):
    """Add a setting, names = (key, as it is spelled there), which only one line may set."""
    key, spelled = names
    if key in found:
        problems.append(f"{where}: {spelled} is set a second time (first at {found[key][1]}): "
                        "delete one")
    found.setdefault(key, (text, where))


def read_conf(path):
    """Read a has.conf: `key = value`, `#` in column 1 is a comment, an indented line goes on.

    Returns ({key: (text, "file:line")}, problems); a file that is not there gives nothing.
    """
    try:
        lines = _lines_of(path)
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        return {}, [_cannot_be_read(path, error)]
    found, problems, key = {}, [], None
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if line.startswith("#") or not line.strip():
            continue
        if line[0] in " \t":
            if key:
                found[key] = (found[key][0] + "\n" + line.strip(), found[key][1])
            else:
                problems.append(f"{where}: this indented line continues nothing: "
                                "start keys in column 1")
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            # what stands there may be a password
            problems.append(f"{where}: this line is not `key = value`")
            key = None
        else:
            _put_down(found, problems, (key, key), value, where)
    return found, problems


def _beside(where, path):
    """`path` as seen from the folder of the file in `where` ("file:line")."""
    path = os.fsdecode(path.encode())           # the same file under every locale
    return os.path.join(os.path.dirname(os.path.abspath(where.rpartition(":")[0])), path)


def load_settings(script, conf):
    """Read the constants in `script` and the file `conf` over them: (Settings, log lines).
    SettingsError has every problem found."""
    constants, problems = read_constants(script)
    if not problems:
        problems = [f"{script}: {key.upper()} is missing from the constants: put it back"
                    for key in SETTINGS if key not in constants]
    overrides, more = read_conf(conf)
    problems += more
    values, texts, places = {}, {}, {}
    for key, (text, where) in [*constants.items(), *overrides.items()]:
        if key not in SETTINGS:
            problems.append(_no_such_setting(key, where, key in constants))
            continue
        if key in PATHS and text:               # beside the file that names it
            text = _beside(where, text)
        try:
            values[key], texts[key], places[key] = SETTINGS[key](text), text, where
        except ValueError as error:
            shown = re.sub(r".+", "(hidden)", text) if key == "hb_pass" else text
            shown = shown.replace("\n", " (goes on, indented) ")
            problems.append(f"{where}: {key} = {shown}: {error}" + (
                f"; {COMMENT_BEHIND}" if key in overrides and _comment_behind(key, text) else ""))
    if problems:
        raise SettingsError(problems)
    problems = _conflicts(values) + _taken_files(values, script, conf)
    try:
        settings = Settings(values, texts, conf=conf if overrides else "")
    except ValueError as error:
        problems.append(str(error))
    if problems:                                # each begins with the key it is about
        raise SettingsError([f"{places[re.match('[a-z_]+', problem).group()]}: {problem}"
                             for problem in problems])
    return settings, _remarks(script, overrides, conf, settings)


def _no_such_setting(key, where, is_constant):
    near = "".join(f"; did you mean {it}?"
                   for it in difflib.get_close_matches(key.lower(), SETTINGS, 1))
    newer = "; if the has.py on disk is newer than the one that runs: kill -USR2"
    return f"{where}: {key}: no such setting{near}{newer if is_constant else ''}"


COMMENT_BEHIND = "a comment needs a line of its own"


def _comment_behind(key, text):
    """What looks like a comment behind a value in has.conf. Notices may begin with `#`."""
    if key.endswith("_notice") and text.startswith("#"):
        return None
    match = re.search(r"\s(#.*)" if key == "on_event" else r"\s([#;].*)", text.partition("\n")[0])
    return match and match.group(1)


def control_path(script, conf):
    """The path of the control socket, whatever else is wrong: a running HAS must be reachable."""
    texts = {**read_constants(script)[0], **read_conf(conf)[0]}
    text, where = texts.get("control_socket", ("", ""))
    return _beside(where, text) if text else default_control_path(conf)


def default_control_path(conf):
    """The path of the control socket where the settings name none."""
    return os.path.splitext(os.path.abspath(conf))[0] + ".sock"


def settings_of(texts, files, conf):
    """Settings that were good once, from what Settings holds of them, without a look at the disk.
    Keys that an older program did not have are as in the constants of the one that runs."""
    constants, _ = read_constants(__file__)
    texts = {**{key: text for key, (text, _) in constants.items()}, **texts}
    values = {key: texts[key] if key in CERTIFICATES else
              _parsed(key, texts[key], constants[key][0]) for key in SETTINGS}
    return Settings(values, texts, files, conf)


def _parsed(key, text, default):
    """The value of a setting that an older program took; if it is refused today, HUP says so."""
    try:
        return SETTINGS[key](text)
    except ValueError:
        good = []
        for part in text.split(",") if key == "mush_address" else ():
            with contextlib.suppress(ValueError):               # no resolver takes it
                good += SETTINGS[key](part)
        return good or SETTINGS[key](default)


def _remarks(script, overrides, conf, settings):
    """What an admin should know of settings that are right."""
    names, warnings = ", ".join(key.upper() for key in overrides), []
    for key, (text, where) in overrides.items():
        comment = _comment_behind(key, text)
        if re.fullmatch(r"(['\"]).*\1", text, re.S):
            warnings.append(f"{where}: the quotes around {key} count as a part of it: "
                            "take them away")
        if comment:
            warnings.append(f"{where}: {comment!r} counts as a part of {key}: {COMMENT_BEHIND}")
    holder = conf if "hb_pass" in overrides else script
    if settings.hb_pass != "heartbeat" and os.stat(holder).st_mode & 0o077:
        warnings.append(f"{holder} holds hb_pass and others may read it: chmod 600 {holder}")
    warnings += _who_else_may_write(script) + _who_else_may_write(conf)
    if settings.log_file and os.path.dirname(settings.log_file) != os.path.dirname(conf):
        warnings += _who_else_may_replace(settings.log_file)
    if settings.on_event and not shutil.which(settings.on_event[0]):
        warnings.append(f"on_event: {settings.on_event[0]} is no program that can be run: nobody "
                        "would be told")
    if any(not network.prefixlen for network in settings.proxy_from):
        warnings.append("proxy_from lists everybody: each user may claim any address, so deny, "
                        "max_per_host and the login brake hold nobody: list your own front only")
    if settings.hb_pass == "heartbeat":
        warnings.append("hb_pass is the one everybody knows: give the heartbeat another, "
                        "and set it here")
    return [f"{conf} overrides the constants {names}" if overrides else
            f"{conf} sets nothing, or is not there: the constants in {script} count",
            *(f"WARNING: {warning}" for warning in warnings)]


def _who_else_may_write(path):
    """Who but us and root could change the file at `path`, or put another in its place."""
    try:
        kept = os.stat(path)
    except OSError:
        return []
    found = []
    if kept.st_mode & 0o022:
        found.append(f"others may write {path}, and have HAS do what they want: chmod go-w {path}")
    if kept.st_uid not in (0, os.geteuid()):
        found.append(f"{path} belongs to another user (number {kept.st_uid}), "
                     "who may change it: chown it")
    return found + _who_else_may_replace(path)


def _who_else_may_replace(path):
    """Who but us and root could put another file, or a link, in the place of the one at `path`."""
    found, real = [], pathlib.Path(path).resolve()
    for folder in real.parents:
        try:
            kept = folder.stat()
        except OSError:                         # it is made later, or start_trouble() tells
            continue
        # sticky: only owners replace files
        if kept.st_mode & 0o022 and not kept.st_mode & stat.S_ISVTX:
            found.append(f"others may write in {folder}, and put another {real.name} there: "
                         f"chmod go-w {folder}")
        if kept.st_uid not in (0, os.geteuid()):
            found.append(f"{folder} belongs to another user (number {kept.st_uid}), who may put "
                         f"another {real.name} there: chown it")
    return found


def _conflicts(values):
    """What settings that are right each for itself have against each other."""
    problems, ports = [], (values["local_port"], values["local_port_ssl"])
    if ports[0] and ports[0] == ports[1]:
        problems.append(f"local_port = {ports[0]}: local_port_ssl is the same port")
    if values["mush_ssl"] and any(address.path for address in values["mush_address"]):
        problems.append("mush_ssl = yes: there is no TLS over the unix: address in mush_address: "
                        "mend one of the two")
    return problems + [
        f"mush_address = {address}: that is HAS itself (local_port, local_port_ssl): "
        "give the port of the MUSH" for address in values["mush_address"]
        if address.host and address.port in ports and _is_ours(address.host, values)]


def _taken_files(values, script, conf):
    """What HAS would write into a file that is another's."""
    taken = {os.path.realpath(path): what for path, what in (
        (script, "HAS itself"), (conf, "the file with the settings"),
        *((values[key], key) for key in CERTIFICATES)) if path}
    problems = []
    for key, path in (("control_socket", values["control_socket"] or default_control_path(conf)),
                      ("log_file", values["log_file"])):
        if path and taken.setdefault(os.path.realpath(path), key) != key:
            problems.append(f"{key} = {path}: that is {taken[os.path.realpath(path)]}: "
                            "give it a file of its own")
    return problems


HOSTS_FILE = "/etc/hosts"


def _known_addresses(name):
    """What a host name stands for on this machine itself: no look-up here, which may take long.
    The heartbeat, which looks names up, notices the others."""
    if name == "localhost" or name.endswith(".localhost"):      # RFC 6761 6.3
        return {"127.0.0.1", "::1"}
    with contextlib.suppress(OSError), open(HOSTS_FILE, errors="replace") as file:
        lines = [line.partition("#")[0].lower().split() for line in file]
        return {words[0] for words in lines if name in words[1:] and _is_numeric(words[0])}
    return set()


def _is_ours(host, values):
    """Whether HAS itself listens at that host."""
    local = values["local_address"]
    everywhere = not local or address_of(local).is_unspecified
    if not _is_numeric(host):
        name, own = host.lower().rstrip("."), socket.gethostname().lower()
        return (everywhere and name in (own, own.partition(".")[0])
                or any(_is_ours(it, values) for it in _known_addresses(name)))
    number = address_of(host)
    if number.is_unspecified:                   # as a target that is this machine
        number = ipaddress.ip_address("::1" if number.version == 6 else "127.0.0.1")
    if not everywhere:
        return number == address_of(local)
    try:
        with socket.socket(socket.AF_INET6 if number.version == 6 else socket.AF_INET) as trial:
            trial.bind((str(number), 0))        # only an address of this machine can be bound
        return True
    except OSError:
        return False


# ======================================================================
# 2. Telnet
#
# Pure: no sockets, no clock. A Scanner splits a stream into text and whole
# telnet commands; an Agreement remembers what client and world settled, and a
# Replay plays the client's part towards a new world, which knows nothing of it.
# ======================================================================

IAC, DONT, DO, WONT, WILL, SB, SE = 255, 254, 253, 252, 251, 250, 240   # RFC 854
ECHO, TTYPE, NAWS, CHARSET, MSSP, GMCP = 1, 24, 31, 42, 70, 201         # RFC 857 1091 1073 2066
NEW_ENVIRON, ENVIRON_IS, ENVIRON_SEND, ENVIRON_INFO = 39, 0, 1, 2       # RFC 1572
CHARSET_REQUEST, CHARSET_ACCEPTED, CHARSET_REJECTED = 1, 2, 3           # RFC 2066
BINARY, SGA, STATUS, TIMING_MARK, EOR = 0, 3, 5, 6, 25                  # RFC 856 858 859 860 885
# WILL and WONT are about the side of who says so, DO and DONT about the other's (RFC 855)
SIDE = {WILL: WILL, WONT: WILL, DO: DO, DONT: DO}
OTHER, OFF = {WILL: DO, DO: WILL}, {WILL: WONT, DO: DONT}
AYT = b"\xff\xf6"
ESCAPE = 27
# Behind these HAS cannot read a stream any more, nor join it: BYTE MACRO (RFC 735), ENCRYPT
# (RFC 2946), START_TLS, MCCP 1, 2 and 3
UNREADABLE = {19, 38, 46, 85, 86, 87}
# On or off is all there is to these: nothing has to be set up anew in front of a new world.
PLAIN_OPTIONS = {BINARY, ECHO, SGA, STATUS, TIMING_MARK, EOR, MSSP}
LONGEST_SB, LONGEST_STRICT, LONGEST_KEPT = 65536, 4096, 1024     # of a sub-negotiation: read of a
                                                # world's, of a client's; remembered
_TEXT = re.compile(rb"(?:[^\xff]+|\xff\xff)*")                          # up to a command
_DETAILS = re.compile(rb"(?:[^\xff]+|\xff[^\xf0])*", re.S)              # up to IAC SE
_COMMAND = re.compile(rb"\xff(?:[\xfb-\xfe].|[^\xfa-\xff])", re.S)


def command(verb, option):
    """The bytes of one telnet option command, such as IAC WILL NAWS."""
    return bytes((IAC, verb, option))


def declined(piece):
    """The answer that declines a WILL or DO."""
    return command(OFF[OTHER[piece[1]]], piece[2])


def is_option(piece):
    """Whether a command is WILL, WONT, DO or DONT."""
    return len(piece) == 3 and piece[0] == IAC and WILL <= piece[1] <= DONT


ASKS_FOR_LIFE = (AYT, command(DO, TIMING_MARK))           # a user presses a key, and waits


def unescape(text):
    """Text with every IAC IAC made the one byte it stands for."""
    return text.replace(b"\xff\xff", b"\xff")


def printable(text):
    """User or world text for the log: nothing in it can steer a terminal."""
    text = text.decode("utf-8", "replace") if isinstance(text, (bytes, bytearray)) else text
    if text.isprintable():
        return text
    joiners = "\u200c\u200d"                    # within words, and emoji
    return "".join(it if it.isprintable() or it in joiners else "?" for it in text)


class Scanner:
    """Splits one direction of a telnet stream into text and commands (RFC 854, 855).

    `feed` returns a list of (is_command, bytes); joined they are the bytes fed, but for an
    unfinished command, which is held until it is whole. IAC IAC is text. A sub-negotiation longer
    than LONGEST_SB is let through as it comes, in pieces whose is_command is None, read by nobody.

    No two servers agree on IAC and another byte than IAC or SE inside a sub-negotiation
    (worlds/bytes.md): if `strict`, it ends there, and only of a long one anything is returned; long
    is LONGEST_STRICT then.
    """

    __slots__ = ("held", "_looked", "inside_long", "strict")

    def __init__(self, strict=False):
        self.strict = strict
        self.held = b""            # an unfinished command
        self._looked = 0           # how much of a held sub-negotiation was searched for its end
        self.inside_long = False   # inside a sub-negotiation that is too long to hold

    def feed(self, data):
        """Take `data`; return what is complete as [(is_command, bytes), ...]."""
        if self.held:
            data, self.held = self.held + data, b""
        pieces, at = [], 0
        while at < len(data):
            if self.inside_long or data.startswith(b"\xff\xfa", at):
                at = self._sub(data, at, pieces)
                continue
            found, is_command = _COMMAND.match(data, at), True
            if not found:
                found, is_command = _TEXT.match(data, at), False
            if found.end() == at:
                self.held = data[at:]
                break
            pieces.append((is_command, found.group()))
            at = found.end()
        return pieces

    def _sub(self, data, start, pieces):
        """Take a sub-negotiation from `start`; return where it ends."""
        at = start if self.inside_long else start + max(2, self._looked)
        end = (_TEXT if self.strict else _DETAILS).match(data, at).end()
        if len(data) - end >= 2:                # else a lone IAC may wait for its second byte
            if data[end + 1] == SE:
                end += 2
                pieces.append((None if self.inside_long else True, data[start:end]))
            elif self.inside_long:
                pieces.append((None, data[start:end] + bytes((IAC, SE))))
            self._looked, self.inside_long = 0, False
            return end
        longest = LONGEST_STRICT if self.strict else LONGEST_SB
        if not self.inside_long and len(data) - start <= longest:
            self.held, self._looked = data[start:], end - start
            return len(data)
        if end > start:
            pieces.append((None, data[start:end]))
        self.held, self._looked, self.inside_long = data[end:], 0, True
        return len(data)


def split_commands(data):
    """Telnet data as [(is_command, bytes)], what is unfinished at its end included as text."""
    scanner = Scanner()
    return scanner.feed(data) + ([(False, scanner.held)] if scanner.held else [])


def unfinished(tail):
    """What ends an escape sequence that `tail`, the end of a text, leaves open (ECMA-48 5.4)."""
    match = re.search(rb"\x1b(\[[0-?]*[ -/]*|\][^\x07\x1b]*|[PX^_][^\x1b]*|[ -/]+|)\Z", tail)
    if not match:
        return b""
    kind = match.group(1)[:1]
    return b"[0m" if not kind else b"m" if kind == b"[" else b"\x1b\\" if kind in b"]PX^_" else b"B"


# What any character set has for the marks that word processors make. Nothing is lost by it.
_PLAIN_MARKS = str.maketrans({
    **dict.fromkeys("\u2018\u2019\u201a", "'"), **dict.fromkeys("\u201c\u201d\u201e\xab\xbb", '"'),
    **dict.fromkeys("\u2010\u2011\u2013", "-"), "\u2014": "--", "\u2026": "...", "\u2022": "*",
    "\xa0": " "})


def in_character_set(text, codec):
    """`text` in the character set a client has agreed to; None: ASCII or, if that loses any, UTF-8.

    What a character set lacks is spelled without its accents, or is `?`.
    """
    if codec is None:
        plain = text if text.isascii() else text.translate(_PLAIN_MARKS)
        return (plain if plain.isascii() else text).encode("utf-8", "replace")
    try:
        return text.encode(codec)
    except UnicodeError:
        return b"".join(_nearest(character, codec) for character in text)


_MARKS_BEYOND_LATIN_1 = {mark: plain for mark, plain in _PLAIN_MARKS.items() if mark > 255}


def in_other_character_set(text, old, new):
    """Bytes of a world, IAC doubled, that were meant for a client with the codec `old`, for one
    with `new`; None is Latin-1, which servers send to clients that agree on nothing."""
    old, new = old or "latin-1", new or "latin-1"
    if codecs.lookup(old) == codecs.lookup(new):
        return text
    plain = unescape(text).decode(old, "replace")
    plain = plain if new == "utf-8" else plain.translate(_MARKS_BEYOND_LATIN_1)
    return plain.encode(new, "replace").replace(b"\xff", b"\xff\xff")


def _nearest(character, codec):
    plain = unicodedata.normalize("NFKD", character.translate(_PLAIN_MARKS))
    for form in (character, plain, "".join(c for c in plain if not unicodedata.combining(c))):
        try:
            return form.encode(codec)
        except UnicodeError:
            continue
    return b"?"


_CHARACTER_SETS = re.compile(r"(?i)utf-?8|iso[-_]?8859-\d\d?|latin-?1|us-ascii|ascii|koi8-[ru]|"
                             r"cp(437|8\d\d|12\d\d|93[26]|949|950)|windows-12\d\d|big5|gbk|"
                             r"gb2312|gb18030|euc-(jp|kr)|shift[-_]jis")


def codec_of(name):
    """The Python codec of a character set named in telnet (RFC 2066), ASCII if it is unknown."""
    try:
        return codecs.lookup(name).name if _CHARACTER_SETS.fullmatch(name) else "ascii"
    except LookupError:
        return "ascii"


class Spelling:
    """How HAS spells its own text for one client: its character set, colour and markup."""

    __slots__ = ("coloured", "marked_up")

    def __init__(self, coloured=False, marked_up=False):
        self.coloured = coloured   # it was sent an escape: colour may be on
        self.marked_up = marked_up # it speaks Pueblo: `<` begins a tag

    def spell(self, text, codec, more=b""):
        """`text`, and `more` as the client itself has typed it, for sending."""
        lines = b"\r\n".join(in_character_set(text, codec).split(b"\n")) + more
        lines = lines.replace(b"\xff", b"\xff\xff")
        if self.marked_up:
            lines = lines.replace(b"&", b"&amp;").replace(b"<", b"&lt;").replace(b">", b"&gt;")
        return lines

    def reset(self):
        """What switches off colours that the world left on."""
        return b"\x1b[0m" if self.coloured else b""

    def end(self, tail):
        """What ends all that `tail`, the end of what the client was sent, leaves open."""
        begun = re.search(rb"<[^<>]*\Z", tail) if self.marked_up else None
        tag = b'"' * (begun.group().count(b'"') % 2) + b">" if begun else b""
        return unfinished(tail) + tag + self.reset()

    def lost(self, cut, notice, codec=None):
        """`notice` in place of `cut`: how many lines were lost, those told of in it included."""
        if not notice:
            return self.reset()
        before, _, behind = (self.spell(part, codec) for part in notice.partition("{lines}"))
        earlier = re.findall(re.escape(before) + rb"(\d+)" + re.escape(behind) + b"\r\n", cut)
        told = len(earlier) * (notice.count("\n") + 1)
        lines = cut.count(b"\n") - told + sum(map(int, earlier))
        return self.reset() + self.spell(filled(notice, lines=lines), codec) + b"\r\n"


PLAIN_SPELLING = Spelling()


class Agreement:
    """What a client and its worlds have settled by telnet (RFC 855, 1143), for the next world."""

    __slots__ = ("client", "world", "naws", "ttypes", "charset", "gmcp", "ignore", "accepted",
                 "codec", "unheard", "partly", "environ", "asked")

    def __init__(self):
        self.client = {}           # (WILL or DO, option) -> its last word: False for WONT or DONT
        self.world = {}            # the same; and (SB, option) -> True: it has asked for details
        self.naws = None           # the last whole NAWS command
        self.ttypes = []           # the client's terminal types as given (MTTS gives three)
        self.environ = []          # its NEW-ENVIRON IS and INFOs behind it; its LANG can set UTF-8
        self.charset = None        # its last word on CHARSET: ACCEPTED, REJECTED or its own REQUEST
        self.partly = False        # it set up more by GMCP than HAS holds
        self.unheard = set()       # options it has offered while no world was there
        self.codec = None          # the Python codec of the character set that was agreed
        self.accepted = False      # an ACCEPTED went down the link that is open
        self.gmcp = []             # what the client set up by GMCP, whole commands
        self.ignore = set()        # answers of the client that nobody waits for
        self.asked = {}            # what it has asked a world that has not answered yet

    @staticmethod
    def _note(side, verb, option):
        side[(SIDE[verb], option)] = verb in (WILL, DO)

    def from_world(self, piece):
        """Remember a command of the world's."""
        if is_option(piece):
            self._note(self.world, piece[1], piece[2])
            if piece[1:] == bytes((DONT, TTYPE)):
                self.ttypes = []
        elif piece[1] == SB and len(piece) > 5:
            self.world[SB, piece[2]] = True     # it has asked
            if piece[2] == CHARSET:
                self._note_codec(piece)

    def changes(self, piece):
        """Whether a WILL, WONT, DO or DONT of the client's changes anything: who is asked for what
        is, or told what he knows, does not answer (RFC 1143 7)."""
        return self.settled(SIDE[piece[1]], piece[2]) is (piece[1] in (WONT, DONT))

    def ask(self, piece):
        """A command of the client's goes to a world, which answers, unless it has asked itself."""
        verb, option = piece[1], piece[2]
        if verb not in OTHER or not self.world.get((OTHER[verb], option)):
            self.asked[SIDE[verb], option] = piece

    def take_asked(self, only=None):
        """The commands (of `only`) that wait for an answer, which the caller will give."""
        taken = [it for it in self.asked.values() if only is None or it in only]
        self.asked = {key: it for key, it in self.asked.items() if it not in taken}
        return taken

    def pending(self):
        """What, of those one may want, the client has offered to no world: [(WILL, option)]."""
        return [(WILL, option) for option in (TTYPE, NAWS, CHARSET) if option in self.unheard
                and self.client.get((WILL, option)) and not self.world.get((DO, option))]

    def from_client(self, piece):
        """Remember a command of the client's; return False if it is an answer nobody waits for."""
        if is_option(piece):
            if piece[1:] in self.ignore:
                self.ignore.discard(piece[1:])
                return False
            self._note(self.client, piece[1], piece[2])
        elif len(piece) > 5 and piece[1] == SB:
            self._note_sub(piece, piece[2], piece[3])
        return True

    def _note_sub(self, piece, option, first):
        if len(piece) > LONGEST_KEPT:
            self.partly = self.partly or option == GMCP
            return
        if option == NAWS:
            self.naws = piece
        elif option == TTYPE and first == 0:
            if piece not in self.ttypes[-1:] and len(self.ttypes) < 8:
                self.ttypes.append(piece)
        elif option == NEW_ENVIRON and first in (ENVIRON_IS, ENVIRON_INFO):
            self.environ = ([piece] if first == ENVIRON_IS else self.environ + [piece])[-8:]
        elif option == CHARSET and first in (CHARSET_REQUEST, CHARSET_ACCEPTED, CHARSET_REJECTED):
            self.charset, self.accepted = piece, self.accepted or first == CHARSET_ACCEPTED
            self._note_codec(piece, forgets=CHARSET_REJECTED)
        elif option == GMCP:
            self._note_gmcp(piece, self._message(piece))

    @staticmethod
    def _message(piece):
        """The name of a GMCP message, lower case."""
        return piece[3:-2].split(b" ")[0].lower()

    def _note_codec(self, piece, forgets=None):
        """Either side accepts what the other has asked for; a client that wants none gets ASCII."""
        if piece[3] == CHARSET_ACCEPTED:
            self.codec = codec_of(unescape(piece[4:-2]).decode("latin-1"))
        elif piece[3] == forgets:
            self.codec = None

    def _note_gmcp(self, piece, kind):
        """Keep what a new world must know; never Char.Login, which holds a password."""
        if kind.startswith((b"char.login", b"core.ping", b"core.keepalive")):
            return
        if not kind.startswith((b"core.hello", b"core.supports.", b"comm.", b"char.")):
            self.partly = True                  # whatever it is: not to be said again by HAS
            return
        if kind not in (b"core.supports.add", b"core.supports.remove"):         # these add up
            self.gmcp = [it for it in self.gmcp if self._message(it) != kind]
        self.partly = self.partly or len(self.gmcp) == 16
        self.gmcp = (self.gmcp + [piece])[-16:]

    def forget(self, option):
        """The client is to set up this option anew."""
        if option == GMCP:
            self.gmcp, self.partly = [], False

    def settled(self, verb, option):
        """Whether the client's side (WILL) or the world's (DO) of an option is agreed to be on."""
        return bool(self.client.get((verb, option)) and self.world.get((OTHER[verb], option)))


class Replay:
    """The client's part of the negotiation on a new link, spoken by HAS from an Agreement.

    It speaks for the client about each option once; a second offer (an in-place restart of the
    world, say) is the client's own affair, and so is every option the client has not met yet.
    """

    __slots__ = ("agreement", "had", "met", "said", "typed", "waits", "late", "early", "requested",
                 "offers", "own")
    ELSEWHERE = "agreement",       # is packed there, see Passage.unpack

    def __init__(self, agreement):
        self.agreement = agreement
        agreement.accepted = False
        self.early = True          # the link is new: what is offered twice was not forgotten
        self.requested = False     # the client's REQUEST was said again: the answer is not for it
        self.had = {key for key in agreement.client if agreement.settled(*key)}
        self.offers = agreement.pending()
        self.met = set()           # (verb as the client's, option) the new world has spoken about
        self.said = set()          # what was sent unasked
        self.own = set()           # what the client has spoken about itself on this link
        self.typed = 0             # terminal types given so far
        self.waits = False         # the server must send telnet first (PennMUSH's unix socket)
        self.late = b""            # what waits for that

    def grow_old(self):
        """What is offered again from now on comes of a world that was started anew in place."""
        self.early = False
        return False                            # see Session.later: another process counts anew

    def spoke(self, piece):
        """The client says this to the new world itself: the answer is for the client."""
        key = SIDE[piece[1]], piece[2]
        self.own.add(key)
        self.had.discard(key)

    def opening(self):
        """What may go in front of the login line: size, terminal, character set, as settled before.

        The servers read a UTF-8 password by CHARSET (worlds/pennmush.md a, tinymux.md a). TinyMUX
        takes that from LANG, too, and takes either unasked (worlds/bytes.md 1).
        """
        kept, out = self.agreement, b""
        for option, detail in ((TTYPE, b""), (NAWS, kept.naws),
                               (NEW_ENVIRON, b"".join(kept.environ)), (CHARSET, kept.charset)):
            if option == NEW_ENVIRON and not detail:
                continue                        # the client's own affair
            verbs = [verb for verb in ((WILL, DO) if option == CHARSET else (WILL,))
                     if (verb, option) in self.had]
            out += b"".join(self._say(verb, option) for verb in verbs)
            if detail and (verbs or option == CHARSET and (SB, CHARSET) not in kept.world):
                out += detail
                if option == CHARSET:
                    self._note_charset()
        # what the client has offered while no world was there: the answer is for the client
        self.own.update(self.offers)
        return out + b"".join(command(*offer) for offer in self.offers)

    def _note_charset(self):
        kind = self.agreement.charset[3]
        self.agreement.accepted = self.agreement.accepted or kind == CHARSET_ACCEPTED
        self.requested = self.requested or kind == CHARSET_REQUEST

    def _say(self, verb, option):
        self.said.add((verb, option))
        return command(verb, option)

    def answer(self, piece):
        """Take a command of the new world; return (bytes for the world, bytes for the client)."""
        if is_option(piece):
            return self._answer_option(piece, piece[1], piece[2])
        if len(piece) > 5 and piece[1] == SB:
            types = self.agreement.ttypes
            if piece[2:4] == bytes((TTYPE, 1)) and (WILL, TTYPE) in self.had and types:
                self.typed += 1
                return types[min(self.typed, len(types)) - 1], b""
            if piece[2:4] == bytes((NEW_ENVIRON, ENVIRON_SEND)) and (WILL, NEW_ENVIRON) in self.had:
                return self._answer_environ(piece)
            if piece[2] == CHARSET:
                return self._answer_charset(piece)
        return b"", piece

    def _answer_environ(self, piece):
        known = b"".join(self.agreement.environ)
        if not known or (SB, NEW_ENVIRON) in self.met:
            return b"", piece                   # it wants something else
        self.met.add((SB, NEW_ENVIRON))
        return known, b""

    def _answer_charset(self, piece):
        if piece[3] == CHARSET_REQUEST and (SB, CHARSET) not in self.met:
            self.met.add((SB, CHARSET))
            answer = self.agreement.charset
            if answer and answer[3] != CHARSET_REQUEST:
                self._note_charset()
                return answer, b""
            if (SB, CHARSET) in self.agreement.world:           # asked before, and never answered
                return b"", b""
        elif piece[3] != CHARSET_REQUEST and self.requested:
            self.requested = False
            return b"", b""
        return b"", piece

    def _answer_option(self, piece, verb, option):
        mine = (OTHER[SIDE[verb]], option)
        on, first = verb in (DO, WILL), mine not in self.met
        self.met.add(mine)
        if mine in self.own - self.said:
            return b"", piece
        if not on:
            self.said.discard(mine)             # what follows is no echo of what HAS has said
        if not first:
            # PennMUSH repeats its offers; a client that answers each would be the second to
            # answer, and a second DO CHARSET kills that server (worlds/pennmush.md)
            if on and self.early and mine in self.said:
                return b"", b""
            self.had.discard(mine)
            return b"", piece
        if not on:
            return b"", piece if mine in self.had else b""
        if mine in self.said:
            return b"", b""                     # its answer to what HAS said unasked
        if mine in self.had and self._can_answer(mine):
            return self._say(*mine) + self._detail(mine), b""
        if mine in self.had:                    # the client sets it up anew if it thinks it was off
            self.had.discard(mine)
            self.agreement.forget(option)
            return b"", self._switch_off(mine) + piece
        if not self.agreement.world.get((verb, option)):
            return b"", piece                   # new to the client, or it only consented to its end
        if self.agreement.client.get(mine) is False:
            return declined(piece), b""
        return b"", b""                         # offered before, and never answered

    def _can_answer(self, mine):
        """Whether HAS holds all that the client would say behind its yes."""
        verb, option = mine
        agreement = self.agreement
        held = {NAWS: agreement.naws, TTYPE: agreement.ttypes, CHARSET: agreement.charset,
                NEW_ENVIRON: agreement.environ, GMCP: agreement.gmcp and not agreement.partly}
        return option in PLAIN_OPTIONS or bool(held.get(option))

    def _switch_off(self, mine):
        """The bytes that switch an option off at the client, whose answer nobody waits for."""
        verb, option = mine
        self.agreement.ignore.add(bytes((OFF[verb], option)))
        self.agreement.client[mine] = self.agreement.world[(OTHER[verb], option)] = False
        return command(OFF[OTHER[verb]], option)        # HAS speaks to the client as the world

    def _detail(self, mine):
        if mine == (WILL, NAWS):
            return self.agreement.naws or b""
        return b"".join(self.agreement.gmcp) if mine == (DO, GMCP) else b""

    def leftovers(self, only=None):
        """What (of `only`) to switch off at the client, for the new world has not offered it."""
        out = b""
        had = self.had if only is None else self.had & only
        for mine in sorted(had - self.met, key=lambda it: (it[1] != ECHO, it)):      # ECHO first
            out += self._switch_off(mine)
        self.had -= had - self.met
        return out


# ======================================================================
# 3. Dialects
#
# One class for each server family: data and small pure functions. Nothing
# outside this part knows which family it talks to. The facts were recorded
# from the real servers.
# ======================================================================

class Credentials:
    """A character's name and password, the verb typed with them. No log or traceback shows them."""

    __slots__ = ("verb", "name", "password", "creates", "text")
    ELSEWHERE = "text",

    def __init__(self, verb, name, password, creates=False):
        self.verb, self.name, self.password = verb, name, password
        self.creates = creates     # the verb makes a new character: it is sent once, as typed
        self.text = ""             # see packed_text()

    def __repr__(self):
        return "Credentials(***)"

    def __eq__(self, other):
        return isinstance(other, Credentials) and (self.name.lower(), self.password) == (
            other.name.lower(), other.password)

    __hash__ = None

    @property
    def character(self):
        """The bare name, lower case, as announcements spell it but for case."""
        return self.name.lstrip(b"*").lower()

    @property
    def is_guest(self):
        """Whether another player may have that name the next time."""
        return self.character == b"guest"

    @property
    def kind(self):
        """What the verb is short for."""
        verb = self.verb.lower()
        return b"connect" if b"connect".startswith(verb) else verb

    @property
    def made(self):
        """These Credentials once they took: whoever was created connects from then on."""
        return Credentials(b"connect", self.name, self.password) if self.creates else self

    def line(self):
        """The login line a world is sent, without its end."""
        name = b'"%s"' % self.name if b" " in self.name else self.name
        return b" ".join((self.verb, name, self.password) if self.password else (self.verb, name))


def rub_out(line, erasers=b"\b\x7f"):
    """`line` as an editor leaves it in which each of `erasers` deletes the byte before it."""
    kept = bytearray()
    for byte in line:
        if byte in erasers:
            del kept[-1:]
        else:
            kept.append(byte)
    return bytes(kept)


def escape_softcode(text, blank=b"%b"):
    """`text` literal for softcode: a backslash before each ASCII byte that is no letter or digit,
    `blank` for a blank. None if it cannot be passed: control bytes, bytes that are no UTF-8,
    characters above U+00FF (they kill TeenyMUSH's evaluation)."""
    try:
        beyond = any(ord(c) > 255 for c in text.decode("utf-8"))
    except UnicodeDecodeError:
        return None
    if beyond or re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", text):
        return None
    special = {b" ": blank, b"\t": b"%t"}
    return re.sub(rb"[^A-Za-z0-9\x80-\xff]",
                  lambda it: special.get(it.group(), b"\\" + it.group()), text)


def abbreviated(word, least):
    """The pattern of a command word that may be cut down to its first `least` letters."""
    return b"(?:%s)" % b"|".join(word[:end] for end in range(len(word), least - 1, -1))


def any_of(*texts):
    """A pattern that finds any of these texts."""
    return re.compile(b"|".join(map(re.escape, texts)))


NEVER = re.compile(rb"(?!)")


class Dialect:
    """What a family has in common with most others; itself the dialect `plain`: a world HAS cannot
    log in to. Data and pure functions; `charset` is what telnet has set on a link, b"" at first.
    """

    name = "plain"
    logs_in = False                # HAS can log its users and its heartbeat in

    # ---- how the server reads what is typed: see LineReader
    telnet = True                  # the server parses telnet; else HAS answers the client itself
    line_end = re.compile(rb"\n")
    dropped = b"\r"                # bytes below 128 that the server drops from a typed line
    erasers = b""                  # bytes that delete the character before them
    erase_answer = b""             # what it says to the first of them
    double_iac = b"\xff\xff"       # what IAC IAC is to it, as that would be typed otherwise
    erase_command = False          # IAC EC is an eraser
    strays_are_text = False        # IAC and a byte that makes no command: that byte is text
    cr_first = False               # CR is taken out even before telnet is
    longest_line = 8000            # bytes the server keeps of a line
    longest_login = 8000           # ... and how long a line may be at the login screen
    capped = False                 # longer lines overrun the server's buffer

    # ---- how a login is proven: see Proof
    mark_before, mark_behind = b"", None        # what around a login line makes a mark prove it
    mark_first = b""               # first of all: a mark that comes only if the user is in already
    block_proof = None             # what must stand between two marks for that
    end_question = b""             # asks for the end marker of a return ...
    end_mark = end_text = end_command = None    # ... which is a mark, a text or a telnet command
    settles = True                 # that can be asked for on one of several links of a character
    not_taken_text = NEVER         # of a login not taken that may be right: it was answered
    refused_text = NEVER           # of a login refused: wrong, taken, closed to guests

    # ---- typed lines
    login_words = NEVER            # group 1: connect-like verb, or group 2: create
    # what follows: a name, in quotes in group 1, then the password
    login_arguments = re.compile(rb'\s*(?:"([^"]+)"\s*|(\S+)\s+)(\S+)')
    quit_playing = quit_login = re.compile(rb"(?i)quit\s*\Z")
    logout = NEVER
    handover_words = ()            # words only HAS may say before a login
    setting_words = setting_playing = NEVER     # lines that set something for the connection
    password_typed = NEVER         # a change of password; group 1 the new one
    password_given = NEVER         # by a wizard; group 1 to whom, 2 the new one
    name_typed = re.compile(rb"(?i)@na(?:me?)?\s+\*?([^\s=]+(?:\s+[^\s=]+)*)\s*="     # group 1 who
                            rb"\s*\"?([^;\s\"]+(?:\s+[^;\s\"]+)*)\"?\s*(?:;.*)?\Z")     # 2 new name
    password_changed = password_kept = name_changed = name_kept = NEVER
    name_alone = NEVER             # what follows: a name without a password, as of a guest
    strips_blanks = True           # commands in the game may have blanks before them
    wraps_settings = False         # setting a suffix shows prefix and suffix once
    settings_held = False          # settings may be repeated before the end marker is asked for

    # ---- the heartbeat's questions
    check_function = None
    blank = b"%b"                  # a blank in softcode
    quota = None                   # commands at once, then one a second
    login_probe = None             # (line, pattern) answered at the login screen
    start_question, start_answer = None, NEVER  # asks for the start id, before a login
    start_command = None           # the telnet offer without which it is not asked
    needed_flag = "WIZARD"         # the flag the heartbeat needs
    flag_question = None           # softcode that tells whether it has it, where no check does
    counts_failures = False        # wrong logins can lock out others: never send a known wrong one
    address_may_be_refused = False # the address line must be switched on in the server

    # ---- connections
    greets = True                  # a banner comes at once
    at_once = 8                    # links that it has not accepted yet, in the same instant
    most_silent = 0                # ... and of any age: its listen backlog less one
    forgets_connects = False       # one that it has not accepted may wait for the next connect
    characters_one_by_one = False  # sessions of one character must come back one after another
    serves_http = True             # on the same port: pages, websocket
    charset_once = False           # after an ACCEPTED no DO CHARSET may follow on a link

    def characters(self, run, charset):
        """What the server stores of a run of bytes above 127, as it can be typed to it again."""
        return run

    def dropped_by(self, charset):
        """The bytes below 128 that the server drops."""
        return self.dropped

    def is_utf8(self, charset):
        """Whether the server erases or drops several bytes as one character."""
        return False

    def finished(self, stored, charset):
        """The line that is carried out, from what is stored; typed again, it is read the same."""
        return stored

    def tame(self, reader, text):
        """`text`, IAC doubled, without what would be read otherwise in another packet."""
        plain = self.double_iac == b"\xff\xff"
        return text if plain else text.replace(b"\xff\xff", self.double_iac)

    def as_text(self, piece):
        """What a telnet command of two bytes is as text to this server (b"": nothing), or None."""
        if piece == b"\xff\xf7" and self.erase_command:
            return b"\b"
        if self.strays_are_text and piece not in (b"\xff\xf1", AYT):
            return piece[1:] if 32 <= piece[1] < 127 or piece[1] == 0 else b"?"
        return b"" if piece[1] < SE else None

    def charset_after(self, sent, charset):
        """The character set the server reads by, after a whole telnet command was `sent` to it."""
        return charset

    def transcoded(self, stored, before, after):
        """What stands in the line when the character set changes in the middle of it."""
        return stored

    def harms(self, line):
        """Whether a line at the login screen must never reach the server."""
        return False

    def in_doubt(self, stored, charset):
        """Whether the server could read a line in the game as LOGOUT and HAS not, or vice versa."""
        return False

    def read_login(self, line):
        """The Credentials in a cleaned line of the login screen, or None if it is no login."""
        verb = self.login_words.match(line)
        if not verb:
            return None
        rest = line[verb.end():]
        words = self.login_arguments.match(rest)
        if words:
            name = b" ".join((words.group(1) or words.group(2)).split())
            return Credentials(verb.group(2) or verb.group(1), name, words.group(3),
                               bool(verb.group(2)))
        alone = verb.group(1) and self.name_alone.match(rest)
        name = alone and b" ".join((alone.group(1) or alone.group(2)).split())
        return Credentials(verb.group(1), name, b"") if name else None

    def is_handover(self, line, word):
        """Whether the server could read this finished line as the hand-over of a user's address; on
        the safe side: other builds may drop or erase more."""
        own = (word.encode(),) if word not in ("auto", "none") else ()
        words = [it.lower() for it in self.handover_words + own]
        if not any(it[0] in line or it[:1].upper()[0] in line for it in words):
            return False                        # the usual case
        bare = re.sub(rb"[^ -~\b\x7f]", b"", line)
        for text in (rub_out(bare), bare.translate(None, b"\b\x7f")):
            typed = re.match(rb"\s*([^\s=]*)", text).group(1).lower()
            if any(typed.startswith(it) or typed[:1] == b"@" and it.startswith(typed)
                   for it in words):
                return True
        return False

    def address_line(self, host, epoch, word, path):
        """What tells the world a user's address, sent once and first; b"" where there is no way.

        `epoch`: when he came, or 0; `word`: as in remotehostname_cmd; `path`: of a unix socket.
        """
        return b""

    def probe(self, nonce):
        """A line a logged-in character sends whose answer is the line `nonce` alone."""
        return b"think %s\r\n" % nonce

    def check(self, pairs, nonce):
        """One line that asks about each of `pairs`; None if one cannot be asked. See verdicts()."""
        calls = [self.check_call(pair) for pair in pairs] if self.check_function else [None]
        return None if None in calls else b"think %s %s %s\r\n" % (nonce, b":".join(calls), nonce)

    def check_call(self, pair):
        """The softcode that asks about one pair, or None."""
        name = escape_softcode(pair.name.lstrip(b"*"), self.blank)
        password = escape_softcode(pair.password)
        if name is None or password is None:
            return None
        star = b"" if name.startswith(b"\\#") else b"*"
        return b"[%s(%s%s,%s)]" % (self.check_function, star, name, password)

    @staticmethod
    def verdicts(answer):
        """The answer between the nonces: [True right, False wrong, None no right to ask]."""
        return [None if b"PERMISSION" in part or b"FUNCTION" in part else part == b"1"
                for part in answer.split(b":")]


# What Perl takes for white space in UTF-8
_WHITE = (rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|"
          rb"\xe3\x80\x80)")


class TeenyMUSH(Dialect):
    """In Perl, with no marks: the server's words prove a login (worlds/teenymush.md)."""

    name = "teenymush"
    serves_http = False
    logs_in = True
    cr_first = True
    longest_login = 7999           # no limit was found; what HAS keeps
    quit_playing = re.compile(_WHITE + rb"*(?i:quit)(?: .*)?\Z", re.S)
    quit_login = re.compile(_WHITE + rb"*(?i:%s)(?: .*)?\Z" % abbreviated(b"quit", 1), re.S)
    # `c` is create, `co` connect; `ch`, `cd` unknown (b)
    login_words = re.compile(_WHITE + rb"*(?:(?i:(%s)|(%s)))(?= )" % (
        abbreviated(b"connect", 2), abbreviated(b"create", 1)))
    # a word is anything without a blank; the last white space separates (worlds/bytes.md 2)
    login_arguments = re.compile(rb' *(?:"([^"]*)"|([^ ]+))' + _WHITE + rb"+([^ ]+) *\Z")
    handover_words = (b"@remotehostname",)
    offers = b"".join((command(WILL, SGA), command(DO, NAWS), command(DO, TTYPE),
                       command(WILL, MSSP)))    # at connect
    refused_text = any_of(b"Either that player does not exist, or has a different password.",
                          b"That name is already in use.")
    outcome = re.compile(rb"(Last connect was from[ :])|" + refused_text.pattern)
    end_question, end_command = command(DO, 86), command(WONT, 86)      # on this socket only
    # from builds that speak no telnet
    end_text = re.compile(rb"(?m)^[^\n]{1,60} has (?:re-)?connected\.\r?\n")
    password_typed = re.compile(rb"(?i)(?:@%s\s+[^\s=]+|@newp\w*\s+me)\s*=\s*(\S+)\s*\Z"
                                % abbreviated(b"password", 4))
    password_changed = re.compile(rb"Password changed\.|The password for .* has been updated\.")
    password_kept = any_of(b"Invalid old password", b"usage: @password")
    name_changed = re.compile(rb"Set\.\Z")
    name_kept = any_of(b"That name is already in use")
    check_function = b"password"
    blank = b"\\ "
    at_once = 1                    # listen backlog 1
    login_probe = (b"WHO\r\n", re.compile(rb"Players? logged in"))
    start_command, start_question = command(WILL, MSSP), command(DO, MSSP)
    start_answer = re.compile(rb"UPTIME\x02(\d+)")

    def read_login(self, line):
        verb = self.login_words.match(line)
        words = verb and self.login_arguments.match(line, verb.end())
        # text outside Latin-1 breaks its password(): no such password, and no outcome line (b)
        if not words or self.harms(line):
            return None
        name = b" ".join((words.group(1) or words.group(2) or b"").split())
        creates = bool(verb.group(2))           # older builds know full words only
        word = b"create" if creates else b"connect"
        return Credentials(word, name, words.group(3), creates) if name else None

    def harms(self, line):
        """It shows everybody a login with characters above U+00FF behind the name."""
        verb = self.login_words.match(line)
        rest = re.sub(rb' *(?:"[^"]*"|[^ ]+)', b"", line[verb.end():], count=1) if verb else b""
        return any(ord(c) > 255 for c in rest.decode("utf-8", "replace"))

    def address_line(self, host, epoch, word, path):
        word = "@remotehostname" if word == "auto" else word
        return f"{word} {host}{f'={epoch}' if epoch else ''}\r\n".encode()


class _InfoFamily(Dialect):
    """The four families that come from one tree: INFO, OUTPUTPREFIX, a command quota."""

    logs_in = settings_held = True
    # any number of quotes and blanks before a name, of quotes behind it
    login_arguments = re.compile(rb'\s*(?:"["\s]*([^"\s][^"]*)"+(?:\s+|(?!["\s]))|'
                                 rb'([^"\s]\S*)\s+)(\S+)')
    name_alone = re.compile(rb'\s*(?:"["\s]*([^"\s][^"]*)"*|([^"\s]\S*))\s*\Z')
    serves_http = False
    dropped, erasers = bytes(range(32)).replace(b"\b", b""), b"\b\x7f"
    erase_answer = b" \b"
    quota = 100
    logout = re.compile(rb"(?i)logout(?:\s.*)?\Z")
    start_question = b"INFO\r\n"
    start_answer = re.compile(rb"Uptime: ([^\r\n]+)\r?\n(?s:.*?)### End INFO\r?\n")
    login_probe = (b"INFO\r\n", re.compile(rb"### End INFO"))
    _settings = (rb"(OUTPUTPREFIX|OUTPUTSUFFIX|SCREENWIDTH|SCREENHEIGHT|PUEBLOCLIENT|SOCKSET|"
                 rb"PROMPT_NEWLINES)(?:%s(\S+(?:\s+\S+)*))?\s*\Z")
    setting_words = setting_playing = re.compile(_settings % rb"\s+")
    refused_text = any_of(b"Either that player does not exist, or has a different password.",
                          b"Either there is already a player with that name, or that name is ill",
                          b"Null passwords are not allowed.", b"Guest logins are disabled.",
                          b"Online character creation is not allowed.")
    password_typed = re.compile(rb"(?i)@%s\s+(?=\S)[^=]+=\s*(\S+)\s*\Z"
                                % abbreviated(b"password", 4))
    password_given = re.compile(rb"(?i)@newp\w*\s+\*?([^\s=]+(?:\s+[^\s=]+)*)\s*=\s*(\S+)\s*\Z")
    password_changed = any_of(b"Password changed.")
    # no texts that may be the answer to a line typed before
    password_kept = any_of(b"Sorry.", b"Null passwords", b"Illegal character", b"Bad new password")
    name_changed = re.compile(rb"(?:Alias set\.\s+)?Name set\.")
    name_kept = any_of(b"That name is already in use", b"You can't use that name",
                       b"You can't give")


_SPELLED = dict(zip("АБВГДЕЗИЙКЛМНОПРСТУФЪЫЬЭ", "ABVGDEZIYKLMNOPRSTUF\"Y'E"))
_SPELLED.update(zip("ΑΒΓΔΕΖΗΙΚΛΜΝΟΠΡΣΤΥΦΧΩ", "ABGDEZHIKLMNOPRSTYFXO"))
_SPELLED.update(zip("ЖХЦЧШЩЮЯΘΞΨ", "Zh Kh Ts Ch Sh Shch Yu Ya Th Ks Ps".split()))
_SPELLED.update({upper.lower(): letters.lower() for upper, letters in _SPELLED.items()})
_SPELLED.update(zip("\u2018\u2019\u201a\u201b\u2039\u203a", "'" * 6))
_SPELLED.update(zip("\u201c\u201d\u201e\u201f", "\"" * 4))
_SPELLED.update(zip("\u2010\u2011\u2012\u2013\u204eĐđĦħıŁłŊŋŦŧ", "----*DdHhiLlNnTt"))
_SPELLED.update({"\u2014": "--", "\u2015": "---", "\u2026": "..."})


def _spell(character):
    """How PennMUSH spells a character for ASCII, as far as that is known; else `?`.

    HAS passes on the spelling (worlds/bytes.md 3): the server need not read the character, then.
    """
    if character < "\x80":
        return character
    base = unicodedata.normalize("NFKD", character)[0] if "\u0100" <= character < "\u0180" else "?"
    return _SPELLED.get(character) or (base if base < "\x80" else "?")


class PennMUSH(_InfoFamily):
    """PennMUSH 1.8.8 (worlds/pennmush.md), over TCP or its unix socket."""

    name = "pennmush"
    line_end = re.compile(rb"\r\n|\r|\n")
    dropped = b""
    erasers, erase_answer = b"\b", b""          # DEL becomes `?` (a)
    double_iac = b"?"
    strays_are_text = True
    login_words = re.compile(rb"(?i) *(?:(%s|c[dhv])|(%s))(?= )" % (
        abbreviated(b"connect", 1), abbreviated(b"create", 2)))
    # one quote ends a name, if it stands right behind it: else it begins the password
    login_arguments = re.compile(rb'\s*(?:"["\s]*([^"\s]+(?:\s+[^"\s]+)*)(?:"\s*|\s+(?="))|'
                                 rb'([^"\s]\S*)\s+)(\S+)')
    quit_playing = quit_login = re.compile(rb"QUIT\Z")
    logout = re.compile(rb"LOGOUT\Z")
    # no blank need follow the word (worlds/bytes.md 3)
    setting_words = setting_playing = re.compile(_InfoFamily._settings % rb"\s*")
    strips_blanks = False
    # a line of one blank is silent before a login and wrapped after it (choreography.md 1)
    mark_first = b"OUTPUTPREFIX %(n)sf\r\n \r\nOUTPUTPREFIX%(p)s\r\n"
    counts_failures = True         # 10 in 10 minutes from one address, over TCP that of HAS (h)
    not_taken_text = any_of(b"Player connections not allowed.",
                            b"This IP address has failed too many times")
    mark_behind = (b"OUTPUTPREFIX %(n)sa\r\nOUTPUTSUFFIX %(n)sz\r\n \r\n"
                   b"OUTPUTPREFIX%(p)s\r\nOUTPUTSUFFIX%(s)s\r\n")
    end_question = b"IDLE %(n)se\r\n"
    end_mark = b"e"
    refused_text = any_of(b"That is not the correct password.",
                          b"There is no player with that name.", b"That name is not allowed.",
                          b"There is already a player with that name.",
                          b"Either that player does not exist",
                          b"The password is invalid (or missing).",
                          b"Guest connections not allowed.", b"Too many guests are connected")
    password_changed = any_of(b"You have changed your password.")
    password_kept = any_of(b"The old password that you entered was incorrect", b"Bad new password")
    password_typed = re.compile(rb"(?i)@%s\s+(?=\S)[^=]+=\s*(\S+)\s*\Z"
                                % abbreviated(b"password", 3))
    check_function = b"checkpass"
    longest_line = longest_login = 4095
    serves_http = True
    charset_once = True            # a DO CHARSET behind CHARSET ACCEPTED kills the server
    greets = False
    at_once = 1                    # connects of the same instant are forgotten, until the
    forgets_connects = True        # next one wakes the server (choreography.md 2)
    most_silent = 4                # its slave looks names up; listen backlog 5 (return-speed.md)
    login_probe = (b"IDLE %(n)s\r\n", re.compile(rb"%(n)s"))

    def finished(self, stored, charset):
        """A NUL cuts off the rest; control bytes become `?`, and UTF-8 becomes ASCII."""
        line = stored.partition(b"\0")[0].translate(self._controls)
        if charset != b"UTF-8":
            return line
        return "".join(map(_spell, line.decode("utf-8", "replace"))).encode()

    def in_doubt(self, stored, charset):
        # six characters of up to four bytes; how it spells each is not known
        return charset == b"UTF-8" and len(stored) <= 24 and not stored.isascii()

    _controls = bytes(63 if n < 32 or n == 127 else n for n in range(256))

    def charset_after(self, sent, charset):
        # on the safe side: read so, a line is passed on in ASCII, which is read the same anyhow
        utf8 = sent[1:3] == bytes((SB, CHARSET)) and b"UTF-8" in sent.upper()
        return b"UTF-8" if utf8 else charset

    def check_call(self, pair):
        name, password = pair.name.lstrip(b"*"), pair.password
        if re.search(rb"[^ -~]", name + password):
            return None                         # decode64 gives `?` or wrong results
        code = base64.b64encode
        who = name if re.match(rb"#\d+\Z", name) else b"*[decode64(%s)]" % code(name)
        return b"[checkpass(%s,decode64(%s))]" % (who, code(password))

    def address_line(self, host, epoch, word, path):
        # through its unix socket, one send within 100 ms of the connect (f)
        return f"{host}^{host}\r\n".encode() if path else b""


class _Tiny(_InfoFamily):
    """What the two have in common that come from TinyMUSH 2.2."""

    quit_playing = re.compile(rb"(?i)quit(?:\s.*)?\Z")
    quit_login = re.compile(rb"(?:QUIT|LOGOUT)(?:\s.*)?\Z")
    setting_playing = re.compile(rb"(?i)" + _InfoFamily.setting_words.pattern)
    end_question = b"INFO\r\n"
    end_text = re.compile(rb"### End INFO\r?\n")
    wraps_settings = True
    flag_question = b"[hasflag(me,wizard)]"
    guest = re.compile(rb'(?i)\s*(?:"["\s]*)?guest')         # begins so, whatever is behind

    def read_login(self, line):
        verb = self.login_words.match(line)
        if verb and verb.group(1) and self.guest.match(line, verb.end()):
            return Credentials(verb.group(1), b"guest", b"")
        return super().read_login(line)


class TinyMUSH(_Tiny):
    """TinyMUSH 4 (worlds/tinymush.md)."""

    name = "tinymush"
    telnet = False                 # sub-negotiations leak into the next line (a)
    line_end = re.compile(rb"\r\n|\r|\n")
    dropped = bytes(n for n in range(32) if n not in (7, 9, 27))       # BS too; DEL edits
    erasers, erase_answer = b"\x7f", b"\b \b"
    double_iac = b""
    login_words = re.compile(rb"\s*(?:(c[od]\S*)|(cr\S*))(?=\s)")
    longest_login = 512
    mark_first = b"OUTPUTSUFFIX %(n)sf\r\nOUTPUTSUFFIX%(s)s\r\n"
    mark_behind = b"OUTPUTSUFFIX %(n)s\r\nOUTPUTSUFFIX%(s)s\r\n"
    at_once = 1                    # no more speed in more (return-speed.md)
    most_silent = 4                # listen backlog 5
    characters_one_by_one = True
    capped = True
    settles = False                # in the game INFO answers on the connection used last

    def characters(self, run, charset):
        return b""

    def finished(self, stored, charset):
        """Without ESC: printed back, it may hang the server (worlds/bytes.md 4)."""
        return stored.replace(b"\x1b", b"")


class TinyMUX(_Tiny):
    """TinyMUX 2.12 (worlds/tinymux.md, bytes.md 1)."""

    name = "tinymux"
    erase_command = True
    longest_line, longest_login = 7990, 400
    login_words = re.compile(rb" *(?:(c[od]\S*)|(cr\S*))(?=\s)")
    not_taken_text = any_of(b"All guests are currently busy", b"Error creating guest")
    # the clearing command is wrapped by the old prefix; two commands behind a login would break
    # @aconnect programs
    mark_first = b"OUTPUTPREFIX %(n)sf\r\n"
    mark_before = b"OUTPUTPREFIX %(n)s\r\n"
    mark_behind = b"OUTPUTPREFIX%(p)s\r\n"
    at_once = 64                   # listen backlog 4096

    # character set -> what is dropped above 127
    _dropped_high = {b"": bytes.fromhex("8081888d8f909899 9b9d"), b"CP437": b"",
                     b"ISO-8859-2": bytes(range(128, 160)), b"US-ASCII": bytes(range(128, 256))}
    _dropped_high[b"ISO-8859-1"] = _dropped_high[b""]
    _codecs = {b"UTF-8": "utf-8", b"CP437": "cp437", b"ISO-8859-2": "iso8859-2",
               b"US-ASCII": "ascii"}            # the others: cp1252
    _longest_sb = 62               # of a longer sub-negotiation it reads nothing
    # a name goes on to its value, a value to the next name, whose mark goes with it
    _variable = re.compile(rb"[\x00\x03]([^\x01]*)\x01([^\x00\x03]*)[\x00\x03]?")
    _locales = {b"lang", b"lc_all", b"lc_ctype"}

    def characters(self, run, charset):
        return run.translate(None, self._dropped_high.get(charset, b""))

    def is_utf8(self, charset):
        return charset == b"UTF-8"

    def dropped_by(self, charset):
        """In CP437 the others stand for characters."""
        return b"\r" if charset == b"CP437" else self.dropped

    def finished(self, stored, charset):
        """A command is known by its first word: without what may be dropped there. Names and
        passwords may hold that: they are read the same each time. In CP437 what would be a blank to
        HAS, and is none, becomes another of its kind."""
        if charset == b"CP437":
            return re.sub(rb"[\t\v\f]", b"\1", stored)
        if charset != b"UTF-8" or stored.isascii():
            return stored
        word = re.match(b" *[^ ]*", stored).group()
        characters = _UTF8_WHOLE.findall(word)
        return b"".join(it for it in characters if it < b"\x80" or _fate(it)) + stored[len(word):]

    def transcoded(self, stored, before, after):
        """What cannot be typed any more counts on as one character."""
        old, new = (self._codecs.get(charset, "cp1252") for charset in (before, after))
        lost = dict.fromkeys(self._dropped_high.get(after, b"") + self.dropped, 63)
        stored = stored.decode(old, "replace").encode(new, "replace")
        return stored.translate(bytes(lost.get(byte, byte) for byte in range(256)))

    def charset_after(self, sent, charset):
        content = unescape(sent[2:-2]) if sent[1] == SB else b""
        if not 2 <= len(content) <= self._longest_sb:
            return charset
        option, kind, said = content[0], content[1], content[2:]
        if option == CHARSET and kind == CHARSET_REJECTED:
            return b"US-ASCII"
        names = []
        if option == CHARSET and kind == CHARSET_ACCEPTED:
            names = [said]
        elif option == CHARSET and kind == CHARSET_REQUEST and said:
            names = said.split(said[:1])[1:-1]  # the last needs a separator behind it, too
        elif option == NEW_ENVIRON and kind in (ENVIRON_IS, ENVIRON_INFO):
            names = [b"UTF-8"] * any(map(self._means_utf8, self._variable.findall(said)))
        return next((it for it in names if it == b"UTF-8" or it and it in self._dropped_high),
                    charset)

    def _means_utf8(self, variable):
        name, value = (part.lower() for part in variable)
        before, dot, behind = value.partition(b".")
        is_locale = name.partition(b"\0")[0] in self._locales
        return is_locale and (behind if dot else before) == b"utf-8"


class RhostMUSH(_InfoFamily):
    """RhostMUSH 4 (worlds/rhostmush.md, bytes.md 5)."""

    name = "rhostmush"
    strips_blanks = False
    # a line that begins with a blank is a login, whatever its first word
    login_words = re.compile(rb"(?i)(?:( +\S+|%s|c(?:da?r?k?|hi?d?e?))|(%s))(?=\s)" % (
        abbreviated(b"connect", 1), abbreviated(b"create", 2)))
    quit_playing = re.compile(rb"(?:QUIT|quit)(?:\s.*)?\Z")
    quit_login = re.compile(rb"(?:QUIT|quit|LOGOUT|logout)(?:\s.*)?\Z")
    logout = re.compile(rb"(?:LOGOUT|logout)(?:\s.*)?\Z")
    handover_words = (b"proxy",)
    not_taken_text = any_of(b"Your attempt to crash this mush")
    # SESSION prints its table only when logged in; both marks come in either state
    mark_first = (b"OUTPUTPREFIX %(n)sb\r\nOUTPUTSUFFIX %(n)sy\r\nSESSION\r\n"
                  b"OUTPUTPREFIX%(p)s\r\nOUTPUTSUFFIX%(s)s\r\n")
    mark_behind = (b"OUTPUTPREFIX %(n)sa\r\nOUTPUTSUFFIX %(n)sz\r\nSESSION\r\n"
                   b"OUTPUTPREFIX%(p)s\r\nOUTPUTSUFFIX%(s)s\r\n")
    block_proof = re.compile(rb"Pend\s+Lost")
    settings_held = False          # its mark is the end marker
    address_may_be_refused = True
    end_mark = b"z"
    check_function = b"checkpass"
    needed_flag = "ROYALTY or IMMORTAL"
    longest_line, longest_login = 16375, 2000
    at_once = 4                    # listen backlog 5

    def address_line(self, host, epoch, word, path):
        if word != "auto":
            return f"{word} {host}\r\n".encode()               # its sconnect_cmd
        kind, here = ("TCP6", "::1") if ":" in host else ("TCP4", "127.0.0.1")
        return f"PROXY {kind} {host} {here} 1 2\r\n".encode()  # HAProxy's PROXY, version 1

    def read_login(self, line):
        login = super().read_login(line)
        if login and line[:1] == b" ":
            login.verb = b"connect"
        return login

    # lead bytes and how many follow, overlong ones too
    _CHARACTER = re.compile(rb"[\xc0-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|"
                            rb"[\xf0-\xf7][\x80-\xbf]{3}|.", re.S)
    _BEGUN = re.compile(rb"(?:[\xc0-\xf7]|[\xe0-\xf7][\x80-\xbf]|[\xf0-\xf7][\x80-\xbf]{2}|"
                        rb"\xff\xff)\Z")
    _PLAIN = {0x20: b" ", 0x201c: b'"', 0x201d: b'"', 0x201f: b'"', 0xff1a: b":"}

    def characters(self, run, charset):
        """Its own spelling of a character, of which each byte is one to its erasers."""
        return b"".join(map(self._spelled, self._CHARACTER.findall(run)))

    def _spelled(self, character):
        first = character[0]
        if len(character) == 1:
            return b"%%<%d>" % first if first > 0xa0 else b""
        value = first & (0x1f, 0x0f, 0x07)[len(character) - 2]
        for byte in character[1:]:
            value = value << 6 | byte & 0x3f
        return self._PLAIN.get(value) or b"%%<u%04x>" % value

    def finished(self, stored, charset):
        """In UTF-8 again, where that comes to the same."""
        def typed(match):
            value = int(match.group(1), 16)
            whole = 0xa0 < value < 0xd800 or 0xe000 <= value < 0x110000
            same = match.group() == b"%%<u%04x>" % value and value not in self._PLAIN
            return chr(value).encode() if whole and same else match.group()
        return re.sub(rb"%<u([0-9a-f]{4,6})>", typed, stored)

    def tame(self, reader, text):
        """IAC IAC takes away what stands behind it, in the next packet too, but for another."""
        text, reader.lead = reader.lead + text, b""
        if IAC in text:                         # a NUL is dropped, and no character spans it
            text = re.sub(rb"\xff\xff(?:(\xff\xff)|[^\xff])",
                          lambda it: b"%<255>" if it.group(1) else b"\0", text)
        begun = self._BEGUN.search(text)
        if begun:
            text, reader.lead = text[:begun.start()], begun.group()
        return text


class Unknown(Dialect):
    """Before the world was seen: a login is kept, never echoed, whatever the family will be."""

    name = "unknown"
    serves_http = False
    dropped, erasers = b"\r\0", b"\b\x7f"
    login_words = re.compile(rb"(?i)\s*(?:(c[odhv]\S*)|(cr\S*|c))(?=\s)")
    handover_words = (b"@remotehostname", b"proxy")


PLAIN, UNKNOWN = Dialect(), Unknown()
DIALECTS = {d.name: d for d in (
    TeenyMUSH(), PennMUSH(), TinyMUSH(), TinyMUX(), RhostMUSH(), PLAIN)}
UNIX_DIALECT = DIALECTS["pennmush"]             # the one family that listens on a unix socket


_RUNS = re.compile(rb"[ -~]+|[\x80-\xff]+|.", re.S)
# What TinyMUX takes for a character of UTF-8, how that may begin, and what begins none
_UTF8 = re.compile(rb"[\xc2-\xcb\xcd-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|"
                   rb"[\xf0\xf3][\x80-\xbf]{3}")
_UTF8_WHOLE = re.compile(rb"[^\x80-\xff]|[\xc0-\xff][\x80-\xbf]*")
_UTF8_BROKEN = re.compile(rb"[\x80-\xc1\xcc\xf1\xf2\xf4-\xff]|.[\x80-\xbf]*.?", re.S)
_UTF8_BEGUN = re.compile(rb"(?:[\xc2-\xcb\xcd-\xf0\xf3]|[\xe0-\xf0\xf3][\x80-\xbf]|"
                         rb"[\xf0\xf3][\x80-\xbf]{2})\Z")


def _fate(character):
    """Whether TinyMUX keeps a UTF-8 character; None: its tables, those of Unicode 8 or so, decide,
    also of marks (worlds/bytes.md 1). Of the letters of Unicode 3.2 it keeps all."""
    try:
        text = character.decode("utf-8")
    except UnicodeDecodeError:
        return False                            # overlong, a surrogate
    kind = unicodedata.ucd_3_2_0.category(text)
    if kind in ("Cc", "Cf") or text in "\xad\u200b":
        return False
    return None if kind in ("Cn", "Co") or kind[0] == "M" else True


class LineReader:
    """The line a user is typing, as a server reads it: dropped, erased, replaced (worlds/bytes.md).

    The family's tables say what becomes of each byte; this keeps the state over packets. `buffer`
    is what stands in the server's line, spelled so that typed again it is read the same.
    """

    __slots__ = ("buffer", "sent", "unfinished", "lead", "charset", "rest", "unsure", "doubt")

    def __init__(self):
        self.charset = b""         # what the server reads by on this link
        self.lead = b""            # the beginning of what must not be cut, still to be read
        self.rest = b""            # what stands behind the line that was yielded last
        self.clear()

    def clear(self):
        """Begin a new line."""
        self.buffer = self.unfinished = b""     # unfinished: of a UTF-8 character
        self.unsure = False                     # the server may have dropped a character
        self.doubt = False                      # ... so the erasers may have taken others
        self.sent = False                       # what is in the buffer went on to the world already

    @property
    def idle(self):
        """Whether nothing of a line was typed yet."""
        return not (self.buffer or self.unfinished or self.lead)

    def lines(self, dialect, text):
        """Read typed text, free of telnet, IAC doubled; yield (bytes, line) for each line and
        (bytes, None) for what is left. The bytes bring a world so far that is to read along."""
        text, at = dialect.tame(self, text), 0
        while at < len(text):
            end = dialect.line_end.search(text, at)
            stop = end.end() if end else len(text)
            begun = b"" if self.sent else unspelled(self.buffer + self.unfinished)
            raw = begun + text[at:stop]
            self._take(dialect, unescape(text[at:end.start() if end else stop]))
            at = stop
            self.rest = text[at:]
            if not end:
                yield raw, None
                return
            yield raw, dialect.finished(self.buffer, self.charset)
            self.clear()

    def break_off(self):
        """Read no more of what lines() was given; return what was not yielded, for another time."""
        rest, self.rest, self.lead = self.rest + self.lead, b"", b""
        self.clear()
        return rest

    def _take(self, dialect, text):
        stored, utf8 = bytearray(self.buffer), dialect.is_utf8(self.charset)
        dropped = dialect.dropped_by(self.charset)
        for run in _RUNS.findall(text):
            if run in dialect.erasers and run:
                self.unfinished, self.doubt = b"", self.unsure
                self._erase(stored, utf8)
                continue
            if utf8 and run != b"\r":
                run = self._utf8(run)
            elif run[0] >= 128:
                run = dialect.characters(run, self.charset)
            room = max(0, dialect.longest_line - len(stored))
            stored += run.translate(None, dropped)[:room]
        self.buffer = bytes(stored)

    @staticmethod
    def _erase(stored, utf8):
        while utf8 and stored and 0x80 <= stored[-1] < 0xc0:
            del stored[-1]
        del stored[-1:]

    def _utf8(self, run):
        """What TinyMUX keeps of a run of bytes: what breaks a character goes with it."""
        kept, run, at = b"", self.unfinished + run, 0
        self.unfinished = b""
        while at < len(run):
            whole, begun = _UTF8.match(run, at), _UTF8_BEGUN.match(run, at)
            if begun:
                self.unfinished = begun.group()
                break
            if whole:
                fate = _fate(whole.group())
                kept += b"" if fate is False else whole.group()
                self.unsure = self.unsure or fate is None
                at = whole.end()
            elif run[at] < 128:
                kept += run[at:at + 1]
                at += 1
            else:
                at = _UTF8_BROKEN.match(run, at).end()
        return kept

    def note_charset(self, dialect, sent):
        """Telnet was sent to the world, which may read otherwise from now on."""
        if CHARSET not in sent and NEW_ENVIRON not in sent:
            return
        before = self.charset
        for is_command, piece in Scanner().feed(sent):
            if is_command:
                self.charset = dialect.charset_after(piece, self.charset)
        if before != self.charset:
            self.buffer = dialect.transcoded(self.buffer, before, self.charset)
            self.unfinished = b""


def unspelled(line):
    """A line as it is sent by telnet."""
    return line.replace(b"\xff", b"\xff\xff")


def recognise(banner, info):
    """The dialect of a world by its banner and its answer to INFO or MSSP; None if none fits."""
    version = re.search(rb"Version: ([^\r\n]+)", info)
    version = version.group(1) if version else b""
    if not version and (b"TeenyMUSH" in banner + info or banner.startswith(TeenyMUSH.offers)):
        return DIALECTS["teenymush"]
    for word, name in ((b"PennMUSH", "pennmush"), (b"Rhost", "rhostmush"), (b"MUX", "tinymux"),
                       (b"TinyMUSH", "tinymush"), (b"4.", "tinymush")):
        if version.startswith(word):
            return DIALECTS[name]
    return None


# ======================================================================
# 4. Logins
#
# Pure: no sockets, no clock. A Proof follows the logins on one link, a Change
# what becomes of the character after them.
# ======================================================================

_MARK = re.compile(rb"(=[0-9a-f]{8})([0-9a-f]{2,8})=([abefyz]?)\r?\n")  # secret, number, letter
# What may follow the secret in a mark of which only the beginning has come.
_MARK_BEGUN = re.compile(rb"(?:[0-9a-f]{0,8}|[0-9a-f]{2,8}=[abefyz]?\r?)\Z")
_AFTER_SECRET = 12                 # bytes of a mark behind that: number, `=`, letter, CR LF
_INFO_BLOCK = re.compile(rb"### Begin INFO(?s:.*?)### End INFO\r?\n")
_INFO_TWICE = re.compile(rb"\A((?s:.*?))%(i)s((?s:.*?))%(i)s" % {b"i": _INFO_BLOCK.pattern})

MOST_TRIES = 64                    # logins of one link whose outcome may still come
MOST_BEHIND = 16                   # lines typed behind them that mean something
MOST_HELD = 1 << 20                # bytes of a return that are kept, the newest
LONGEST_OUTCOME = 300              # bytes of an unfinished line that is read along, the newest
MOST_BLOCK = 4096                  # bytes behind a mark that are looked at: the first
END_SECONDS = 1                    # a world that knows telnet has answered question() by then


class News(enum.Enum):
    """What a Proof has learned from text of the world, in the order in which it happens."""

    TOOK = "a login took: see `login`"
    ASK = "now question() is to be sent, and end() called END_SECONDS later"
    ENDED = "the end marker of a return came: all is known"


class Proof:
    """The logins on one link, a user's or the heartbeat's own: which of them took (rule 5). Pure.

    `script` is a whole login that HAS sends, `wrap` makes one that is typed provable. `hear` takes
    the link's text, free of telnet, `saw_command` a telnet command. While `returning`, all up to
    the end marker is kept in `held`. There is one for each link: see proof_for().
    """

    __slots__ = ("dialect", "returning", "telnet", "held", "login", "refused", "ended", "_tries",
                 "_count", "_number", "_behind", "is_first", "_was_in")

    asked = False                  # question() was due
    others = ()                    # Credentials typed behind `login`, which may be the right ones

    def __init__(self, dialect, returning, telnet, tries):
        self.dialect = dialect
        self.returning = returning # everything is held until the end marker
        self.telnet = telnet       # the server does not take telnet for text
        self.held = b""
        self.login = None          # the Credentials that took
        self.refused = False       # the server said that a login was wrong
        self.ended = False         # the end marker was seen
        self._tries = tries        # the Credentials whose outcome may still come
        self.is_first = True       # nobody was in the game on this link before `login`
        self._was_in = False
        self._count = 0            # of those tried; never used again on this link
        self._number = 0           # of `login` among those
        self._behind = []          # lines typed behind them: (how many came before it, line)

    @property
    def is_whole(self):
        """Whether `login` is proven, not only likely: who was in the game may have read marks, or
        typed them away, by @program."""
        return self.is_first

    @property
    def live(self):
        """Whether the link's text must be heard: a byte: what has that in it; else all or none."""
        return bool(self._tries or self.returning and not self.ended)

    def retire(self):
        """Forget the logins: no outcome can come any more."""
        self._tries.clear()

    def script(self, login, settings=b""):
        """The bytes that log `login` in on a new link, with the question for the end marker where
        it need not wait. `settings` are lines to be answered before: see Dialect.settings_held."""
        return self.wrap(login, unspelled(login.line()) + b"\r\n", {}, True) + settings

    def no_login(self, line):
        """A line was typed at the login screen that is no whole login."""

    def type_behind(self, line):
        """A line was typed that means something if it is read in the game: behind a login."""
        if self._tries:
            self._behind.append((self._count, line))
        if len(self._behind) > MOST_BEHIND:     # nothing is learnt of what HAS cannot follow
            self._disown()

    def next_behind(self):
        """The next line that was typed behind `login`, or None."""
        while self._behind:
            count, line = self._behind.pop(0)
            if count > self._number:
                return line
        return None

    def log_out(self):
        """He is at the login screen again; another login may have been typed behind that."""
        self.login = None

    def hear(self, text):
        """Take text of the world; return what the user may see of it, and a list of News."""
        before = (self.login, self.asked, self.ended)
        shown = self.feed(text)
        after = (self.login, self.asked, self.ended)
        return shown, [news for news, was, now in zip(News, before, after)
                       if now and now is not was]

    def saw_command(self, piece):
        """Whether a telnet command of the world is the end marker."""
        return False

    def _hold(self, text):
        """Keep text of a return; return what stands behind its end."""
        if not self.returning or self.ended:
            return text
        self.held = (self.held + text)[-MOST_HELD:]
        end = self._end_of_held()
        if end is None:
            return b""
        after, self.held = self.held[end:], self.held[:end]
        self.end()
        return after

    def _end_of_held(self):
        """Where the end text stops in `held`, or None."""
        end = self.dialect.end_text and self.dialect.end_text.search(self.held)
        return end.end() if end else None

    def end(self):
        """The end marker was seen: all that came of the login is in `held`."""
        self.ended = True
        self.refused = bool(self.dialect.refused_text.search(self.held))

    def words(self):
        """What the world said up to the end marker: without its answer to HAS's own question."""
        asked_by_info = self.dialect.end_question == b"INFO\r\n"
        return _INFO_BLOCK.sub(b"", self.held) if asked_by_info else self.held

    @property
    def settles(self):
        """Whether the end marker can be asked for once more, in the game."""
        return self.dialect.settles and self.telnet

    def ask_again(self):
        """The bytes that do so; until it comes all is held and dropped."""
        self.ended, self.held = False, b""
        return self.question()


class MarkProof(Proof):
    """Marks around each login line, set with OUTPUTPREFIX and the like, tell whether it took."""

    __slots__ = ("_secret", "_tail", "_block")

    def __init__(self, dialect, returning=False, telnet=True):
        super().__init__(dialect, returning, telnet, {})        # the number in its marks -> login
        self._secret = b"=" + secrets.token_hex(4).encode()
        self._tail = b""           # a held-back tail that could begin a mark
        self._block = None         # the text since a mark `a`, removed with it

    @property
    def live(self):
        if self._block is not None or self._tail or self.returning and not self.ended:
            return True
        return self._secret[:1] if self._tries else False

    def _nonce(self, login):
        number = b"%02x" % self._count
        self._count += 1
        self._tries[number] = login
        for old in list(self._tries)[:-MOST_TRIES]:
            del self._tries[old]
        return self._secret + number + b"="

    def _fill(self, template, nonce, settings):
        prefix, suffix = (unspelled(settings.get(word, b""))
                          for word in (b"OUTPUTPREFIX", b"OUTPUTSUFFIX"))
        return template % {b"n": nonce, b"p": prefix and b" " + prefix,
                           b"s": suffix and b" " + suffix}

    def wrap(self, login, line, settings, first=False):
        """The bytes to send for `line`, a login line; `first`: nothing was typed on this link yet.
        `settings`: the user's own, to be set again."""
        nonce, dialect = self._nonce(login), self.dialect
        front = (b"" if first else dialect.mark_first) + dialect.mark_before
        return (self._fill(front, nonce, settings) + line
                + self._fill(dialect.mark_behind, nonce, settings))

    def script(self, login, settings=b""):
        """The bytes that log `login` in, the question for the end marker included."""
        nonce = self._secret + b"%02x=" % self._count           # the one wrap() takes
        return super().script(login, settings) + self._fill(self.dialect.end_question, nonce, {})

    def question(self):
        """The bytes that ask for the end marker alone."""
        template = self.dialect.end_question or self.dialect.mark_behind
        return self._fill(template, self._nonce(None), {})

    def feed(self, text):
        """hear() without the news."""
        text, self._tail = self._tail + text, b""
        shown, at = [], 0
        for match in _MARK.finditer(text):
            if match.group(1) == self._secret:
                shown.append(self._let_through(text[at:match.start()]))
                self._mark(match.group(2), match.group(3))
                at = match.end()
        cut = self._beginning_of_a_mark(text, at)
        self._tail = text[cut:]
        shown.append(self._let_through(text[at:cut]))
        return b"".join(shown)

    def _beginning_of_a_mark(self, text, at):
        """Where a tail starts that could begin a mark, or the length of `text`."""
        whole = len(self._secret) + _AFTER_SECRET
        start = text.find(b"=", max(at, len(text) - whole + 1))
        while start >= 0:
            tail = text[start:]
            if self._secret.startswith(tail) or tail.startswith(self._secret) and _MARK_BEGUN.match(
                    tail, len(self._secret)):
                return start
            start = text.find(b"=", start + 1)
        return len(text)

    def _let_through(self, text):
        if self._block is None:
            return self._hold(text)
        self._block = (self._block + text)[:MOST_BLOCK]
        return b""

    def _mark(self, number, letter):
        """A mark came. Its letter: a and b begin a block, z and y end it; b, y and f stand before
        the login line, e behind all."""
        if letter in (b"a", b"b"):
            self._block = b""
        elif letter != b"e":
            proof = self.dialect.block_proof
            if not proof or proof.search(self._block or b""):
                self._is_in(number, letter in (b"f", b"y"))
            self._block = None
        if letter == self.dialect.end_mark:
            self.end()

    def _is_in(self, number, before):
        """The user is in the game, `before` the login line of that number or behind it. If another
        had taken, he was out again in between."""
        login, self._tries[number] = self._tries.get(number), None
        if login and not before:                # else whatever the line was, he is not in by it
            self.login, self._number, self.is_first = login, int(number, 16), not self._was_in
        self._was_in = True

    def _disown(self):
        self._tries = dict.fromkeys(self._tries)


class WordProof(Proof):
    """Families without marks: their words for an outcome, one for each login line, in order.

    A user can have such a line printed, so `login` is but likely. The end marker is a telnet
    command; from builds that know no telnet it is a text, after a refusal nothing.
    """

    __slots__ = ("asked", "others", "_line")

    is_whole = False

    def __init__(self, dialect, returning=False, telnet=True):
        super().__init__(dialect, returning, telnet, collections.deque())
        self.asked, self.others = False, []
        self._line = b""           # an unfinished line, read along only

    def wrap(self, login, line, settings, first=False):
        self._tries.append(login)
        self._count += 1
        return line

    def no_login(self, line):
        """A line that is no whole login may be answered like one: its outcome is nobody's."""
        match = self.dialect.login_words.match(line)
        if match and match.group(1) and len(line[match.end():].split()) == 1:
            self.wrap(None, line, {})

    def question(self):
        """The bytes that ask for the end marker; none where telnet is not known."""
        return self.dialect.end_question if self.telnet else b""

    def feed(self, text):
        self._read_outcomes(text)
        return self._hold(text)

    def _read_outcomes(self, text):
        """The outcome of a line begins a line. But lines that a build does not know as a login
        (`con` on older TeenyMUSHes) have none: so the ones behind it may be right too."""
        *lines, self._line = (self._line + text).split(b"\n")
        self._line = self._line[-LONGEST_OUTCOME:]
        for line in lines:
            outcome = self._tries and self.dialect.outcome.match(line)
            if not outcome:
                continue
            number, login = self._count - len(self._tries), self._tries.popleft()
            if outcome.group(1) and self.login is None:
                self.login, self.others = login, [it for it in self._tries if it]
                self._number = number
                self._tries.clear()
            self.asked = self.asked or self.returning

    def _disown(self):
        self._tries = collections.deque([None] * len(self._tries))

    def _end_of_held(self):
        if self.telnet or not self.asked:
            return None
        return super()._end_of_held() if self.login else len(self.held)

    def saw_command(self, piece):
        if not self.asked or piece != self.dialect.end_command or self.ended:
            return False
        self.end()
        return True


def proof_for(dialect, returning=False, telnet=True):
    """A Proof for a new link: by marks where the family has them, else by its words."""
    return (MarkProof if dialect.mark_behind else WordProof)(dialect, returning, telnet)


class Change:
    """A typed change of a password or name, followed until the world answers (rule 7)."""

    MOST_BEHIND = 8
    __slots__ = ("kind", "new", "until", "other", "behind", "_line")

    def __init__(self, kind, new, until, other=None):
        self.kind, self.new = kind, new         # "password" or "name"
        self.until = until         # no answer comes after this time
        self.other = other         # one of the other kind that is not answered yet either
        self.behind = ()           # typed behind it, of the same kind: the answers come in order
        self._line = b""           # text of the world that was not looked at: an unfinished line

    def outcome(self, dialect, text):
        """Take text of the world: True (changed), False (refused) or None (not answered yet)."""
        *lines, self._line = (self._line + text).split(b"\n")
        changed, kept = ((dialect.password_changed, dialect.password_kept)
                         if self.kind == "password" else (dialect.name_changed, dialect.name_kept))
        for number, line in enumerate(lines):
            line = line.strip(b" \b\r")         # blanks and BS answer the erasers he typed
            if changed.match(line) or kept.match(line):
                self._line = b"\n".join(lines[number + 1:] + [self._line])
                return bool(changed.match(line))
        self._line = self._line[-LONGEST_OUTCOME:]
        return None

    def next(self):
        """The one typed behind it, once it is answered, or None."""
        if not self.behind:
            return None
        change = Change(self.kind, self.behind[0], self.until)
        change.behind, change._line = self.behind[1:], self._line
        return change

    def last_of(self, login):
        """The Credentials that `login` has become if the last one behind it took."""
        return (Change(self.kind, self.behind[-1], 0) if self.behind else self).of(login)

    def of(self, login):
        """The Credentials that `login` has become."""
        if self.kind == "password":
            return Credentials(login.verb, login.name, self.new)
        return Credentials(login.verb, self.new, login.password)


# ======================================================================
# 5. Wire
#
# How values go over to another process, calls to another thread, bytes to
# another machine.
# ======================================================================

PACKED = {"Credentials": lambda: Credentials(b"", b"", b""), "Scanner": Scanner,
          "Agreement": Agreement, "Replay": lambda: Replay(Agreement()),
          "MarkProof": lambda: MarkProof(PLAIN), "WordProof": lambda: WordProof(PLAIN),
          "LineReader": LineReader, "Spelling": Spelling,
          "Typed": LineReader,                  # so older programs called it
          "Change": lambda: Change("", b"", 0)}
CONTAINERS = {kind.__name__: kind for kind in (list, tuple, set, collections.deque)}
KINDS = frozenset(CONTAINERS.values())
PLAIN_KINDS = {type(None), bool, int, float, str}


def pack(value):
    """`value` as what JSON can hold: bytes, containers, dialects and the objects of PACKED too."""
    kind = type(value)
    if kind in PLAIN_KINDS:
        return value
    if kind is bytes or kind is bytearray:
        return {"bytes": value.decode("latin-1")}
    if kind is dict:
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if kind in KINDS:
        items = [item if type(item) in PLAIN_KINDS else pack(item) for item in value]
        is_plain = kind is list and all(type(item) in PLAIN_KINDS for item in value)
        return items if is_plain else {kind.__name__: items}
    if isinstance(value, (int, str)):           # an enum of theirs
        return value
    return {"dialect": value.name} if isinstance(value, Dialect) else _pack_object(value, kind)


def packed_text(value):
    """The JSON of pack(value); of what is most often asked for without much ado."""
    kind = type(value)
    if kind is bool or value is None:
        return _CONSTANTS[value]
    if kind is int or kind is float and math.isfinite(value):
        return repr(value)
    if kind is bytes:
        return f'{{"bytes": {_encoded(value.decode("latin-1"))}}}'
    if kind is tuple:
        return f'{{"tuple": [{", ".join(map(packed_text, value))}]}}'
    if kind is dict:
        items = [f"[{packed_text(key)}, {packed_text(item)}]" for key, item in value.items()]
        return f'{{"dict": [{", ".join(items)}]}}'
    if kind is Credentials:                     # they stand in several places
        value.text = value.text or _object_text(value, kind)
        return value.text
    return _object_text(value, kind) if kind.__name__ in PACKED else _encoded(pack(value))


_CONSTANTS = {None: "null", False: "false", True: "true"}
_encoded = json.JSONEncoder().encode            # dumps() looks at its arguments first


def _pack_object(value, kind):
    """Only what differs from a new one is packed."""
    slots = {}
    for name, (blank, packed_blank, _) in _blank(kind).items():
        item = getattr(value, name)
        if item is not blank and item != blank:
            packed = pack(item)
            if packed != packed_blank:
                slots[name] = packed
    return {"object": kind.__name__, "slots": slots}


def _object_text(value, kind):
    """The same as JSON."""
    slots = []
    for (name, (blank, _, blank_text)), item in zip(_blank(kind).items(), _attributes(kind)(value)):
        if item is not blank and item != blank:
            text = packed_text(item)
            if text != blank_text:
                slots.append(f'"{name}": {text}')
    return f'{{"object": "{kind.__name__}", "slots": {{{", ".join(slots)}}}}}'


def _slots_of(value):
    return {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}


@functools.lru_cache(None)
def _blank(kind):
    """What the slots of a new object of this class hold: {name: (value, packed, its text)}."""
    blank = PACKED[kind.__name__]()
    values = {name: getattr(blank, name)
              for name in _slots_of(blank) - set(getattr(kind, "ELSEWHERE", ()))}
    return {name: (value, pack(value), packed_text(value)) for name, value in values.items()}


def unpack(value):
    """What pack() was given. Slots that an older program did not have keep their defaults."""
    if not isinstance(value, dict):
        return value
    (kind, content), = [item for item in value.items() if item[0] != "slots"]
    if kind == "object":
        slots = value["slots"]
        if content == "Proof":                  # older programs had one class for both kinds
            content = type(proof_for(unpack(slots["dialect"]))).__name__
        made = PACKED[content]()
        for name in _slots_of(made) & set(slots):
            setattr(made, name, unpack(slots[name]))
        return made
    if kind in CONTAINERS:
        return CONTAINERS[kind](map(unpack, content))
    makers = {"bytes": lambda: content.encode("latin-1"), "dialect": lambda: DIALECTS[content],
              "dict": lambda: {unpack(key): unpack(item) for key, item in content}}
    return makers[kind]()


class Survivor:
    """Takes some of its attributes over an upgrade: those that SURVIVES names.

    Other programs read these names, older and newer ones: one never changes its meaning, nor from
    being nothing (0, empty, None) at first to something else.
    """

    SURVIVES, __slots__ = (), ()
    PASSING = ()                   # of these: changes so often that it is written down with others

    @classmethod
    def watched(cls):
        """The names of which a change is worth a record."""
        return [name for name in cls.SURVIVES if name not in cls.PASSING]

    def survivors(self):
        """What a new process takes over, for JSON: {name: value}; what is nothing is left out."""
        values = ((name, getattr(self, name)) for name in self.SURVIVES)
        return {name: pack(value) for name, value in values if value}

    def take_up(self, values):
        """Take over what survivors() of another process gave, and perhaps more than that."""
        for name in self.SURVIVES:              # in this order
            if name in values:
                setattr(self, name, unpack(values[name]))


# Nothing changes in these: another value is another object.
FIXED = {*PLAIN_KINDS, bytes, Credentials, Spelling} | {
    type(it) for it in [*DIALECTS.values(), UNKNOWN, PLAIN]}


def snapshot(value):
    """Something that is equal to the next snapshot of `value` only if that has not changed."""
    kind = type(value)
    if kind in FIXED:
        return value
    if kind is dict:
        return tuple(value.items())
    if not value:
        return ()
    items = value if kind in KINDS else _attributes(kind)(value)
    return tuple([it if type(it) in FIXED else snapshot(it) for it in items])


@functools.lru_cache(None)
def _attributes(kind):
    """What takes the attributes of such an object that are packed, as a tuple."""
    names = tuple(_blank(kind))
    getter = operator.attrgetter(*names)
    return getter if len(names) > 1 else lambda it: (getter(it),)


def survives(made):
    """Class decorator: objects of it are packed, with all their slots."""
    PACKED[made.__name__] = made
    return made


class Mailbox:
    """Calls posted by any thread (or a signal handler), run by the owner's thread in order."""

    def __init__(self):
        self._calls, self._woken = collections.deque(), False
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)

    def post(self, call, *arguments):
        """Have the owner run `call(*arguments)` soon. Any thread may call; never blocks."""
        self._calls.append((call, arguments))
        if not self._woken:                     # else run() is still to come
            self._woken = True
            self.writer.send(b"\0")

    def run(self):
        """Run what was posted; what that posts is run next time. The owner's thread only."""
        with contextlib.suppress(BlockingIOError):
            self.reader.recv(4096)
        self._woken = False                     # before it is seen how many there are
        for _ in range(len(self._calls)):
            call, arguments = self._calls.popleft()
            call(*arguments)


READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
NOT_NOW = (BlockingIOError, InterruptedError) + (
    (ssl.SSLWantReadError, ssl.SSLWantWriteError) if ssl else ())       # the heartbeat's own TLS
HIGH_WATER, LOW_WATER = 262144, 65536          # bytes held: pause the other side, resume it
CHUNK, TLS_RECORD = 65536, 16384               # bytes read at a time; RFC 8446 5.1
LOOK_BYTES = 1024                  # read at a time of what may have to be written down
LINK_KEEPALIVE = 15, 5, 3          # for tune(): a world that has vanished is noticed in 30 s
CLIENT_KEEPALIVE = 60, 15, 5       # NAT forgets idle connections after minutes
DOUBTFUL_LINES = 20                # acknowledged last, and perhaps never read
MANY_CHUNKS, MUCH = 48, 8192       # of a Trail: writes, or bytes, and it is time to look at it
MANY_NOTES, SMALL_CHUNK = 8192, 2048            # of a Journal: two for each write of so many bytes


TCP_ESTABLISHED = b"\x01"          # the first byte of struct tcp_info (netinet/tcp.h)


def can_tell_life(sock):
    """Whether acknowledged_ago() can say anything of this client: Linux, TCP."""
    return (sock is not None and hasattr(socket, "TCP_INFO") and sys.platform == "linux"
            and sock.family in (socket.AF_INET, socket.AF_INET6))


def acknowledged_ago(sock):
    """Seconds since the peer's kernel has acknowledged anything (tcpi_last_ack_recv, tcp(7))."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
    except OSError:
        return math.inf
    return struct.unpack_from("I", info, 56)[0] / 1000


def has_left(sock):
    """Whether the peer has ended a TCP connection, perhaps behind bytes that wait to be read."""
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    except OSError:
        return True
    return state != TCP_ESTABLISHED


def ask_for_life(sock):
    """Have the kernel probe this client's at once, if it was idle for a second (tcp(7)): the time
    between probes must be set first."""
    for option in ("TCP_KEEPINTVL", "TCP_KEEPIDLE"):
        with contextlib.suppress(OSError):      # it has ended; that will be heard
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), 1)


def tune(sock, idle, interval, count, user_timeout=0):
    """Keep a TCP connection prompt and notice a vanished peer; seconds. What a platform can."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    wanted = {"SO_KEEPALIVE": 1, "SO_OOBINLINE": 1,             # the latter for Synch (RFC 854)
              "TCP_NODELAY": 1, "TCP_KEEPIDLE": idle,
              "TCP_KEEPALIVE": idle,            # so macOS calls it
              "TCP_KEEPINTVL": interval, "TCP_KEEPCNT": count,
              "TCP_USER_TIMEOUT": int(user_timeout * 1000)}
    for option, value in wanted.items():
        level = socket.IPPROTO_TCP if option.startswith("TCP_") else socket.SOL_SOCKET
        if value and hasattr(socket, option):
            with contextlib.suppress(OSError):  # known but not for this socket: the default stays
                sock.setsockopt(level, getattr(socket, option), value)


def acknowledge(sock):
    """Have the kernel acknowledge now what has come (Linux, TCP): a server that writes an answer
    in pieces, without TCP_NODELAY, waits 40 ms for that otherwise. It does not stay set."""
    if hasattr(socket, "TCP_QUICKACK"):
        with contextlib.suppress(OSError):      # not TCP, or gone
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def reset(sock):
    """Close with RST, so that the port is free at once."""
    with contextlib.suppress(OSError):          # it never was connected (macOS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def hang_up(sock):
    """End a connection and close the socket, also if there are copies of it: the peer sees it."""
    with contextlib.suppress(OSError):          # the peer was first
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def has_ended(sock):
    """Whether a socket that does not block has ended, and nothing more is to be read."""
    try:
        return not socket.socket.recv(sock, 1, socket.MSG_PEEK)     # below TLS, if there is any
    except NOT_NOW:
        return False
    except OSError:
        return True


def is_connected_to_itself(sock):
    """Whether a connect to a dead local port met its own outgoing port (TCP simultaneous open)."""
    try:
        return (sock.family != getattr(socket, "AF_UNIX", None)
                and sock.getsockname() == sock.getpeername())
    except OSError:
        return False                            # gone again already


def begin_connect(target):
    """A non-blocking socket that connects to target = (family, address); OSError where that fails
    at once. When it can be written to, connect_error() says how it went."""
    sock = socket.socket(target[0], socket.SOCK_STREAM)
    sock.setblocking(False)
    error = sock.connect_ex(target[1])
    if error not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(error, os.strerror(error))
    return sock


def connect_error(sock):
    """Why such a socket is not connected, as an OSError, or None; it is to be reset() then."""
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        return OSError(error, os.strerror(error))
    if is_connected_to_itself(sock):            # it holds the port that the MUSH needs
        return OSError(errno.ECONNREFUSED, "connected to itself: nothing listens there")
    return None


def unacknowledged(sock):
    """How many of the bytes that were sent the peer's kernel has not acknowledged: true also after
    a reset. 0 where this platform does not say (see CAN_TELL_UNSEEN)."""
    try:
        if sys.platform == "darwin":            # SO_NWRITE of its sys/socket.h
            return sock.getsockopt(socket.SOL_SOCKET, 0x1024)
        count = fcntl.ioctl(sock.fileno(), _UNSENT, struct.pack("i", 0))
    except OSError:
        return 0
    return struct.unpack("i", count)[0]


# SIOCOUTQ (tcp(7)), FIONWRITE of FreeBSD's sys/filio.h; elsewhere nobody can tell
_UNSENT = (termios.TIOCOUTQ if termios and sys.platform == "linux" else
           0x40046677 if fcntl and sys.platform.startswith("freebsd") else None)
CAN_TELL_UNSEEN = _UNSENT is not None or sys.platform == "darwin"


class Journal:
    """What clients were sent just now, for their trails: trail and bytes, trail and bytes, all in
    one list. That stays in the processor's cache; a list for each client does not, and half a
    microsecond for each line is what that costs."""

    __slots__ = ("recent",)

    def __init__(self):
        self.recent = []           # always this list (see Stream.send)

    def deliver(self):
        """Give each trail what is its own."""
        recent, pieces = self.recent, collections.defaultdict(list)
        for trail, data in zip(recent[::2], recent[1::2]):
            pieces[trail].append(data)
        recent.clear()
        for trail, found in pieces.items():
            trail.take(b"".join(found))


class Trail:
    """The newest bytes that were handed to the kernel for a client: what of them it never got is
    shown to it when it comes back. `ask` says how many were not acknowledged, or more; `slack` how
    many it may not count.

    The end of what was acknowledged is kept, too, for the beginning of a line and for what a kernel
    has acknowledged and its program has never read: ADMITTED bytes, RESTING of an idle client.
    """

    ADMITTED, RESTING = 2048, 384
    __slots__ = ("limit", "ask", "slack", "journal", "chunks", "lost", "lost_lines", "whole",
                 "_many", "_much", "_grown", "_cut")

    def __init__(self, limit, ask, slack=0, journal=None):
        self.limit, self.ask, self.slack = limit, ask, slack
        self.journal = journal or Journal()     # in which newer ones may stand
        self.chunks = []           # as written, oldest first
        self.lost = b""            # what came when nothing could be sent any more
        self.lost_lines = 0        # of that, which was too much
        self.whole = True          # the first chunk begins with the start of a line
        self._many, self._much = MANY_CHUNKS, MUCH  # chunks; bytes more: it is time to trim()
        self._grown = 0
        self._cut = ()             # (bytes, lines) left out, perhaps before they were acknowledged

    def add(self, data):
        """The kernel took `data`."""
        self.journal.deliver()                  # what it took before
        self.take(data)

    def take(self, data):
        """The same, of what stood in the journal."""
        self.chunks.append(data)
        self._grown += len(data)
        if self._grown > self._much or len(self.chunks) > self._many:
            self.trim()

    def add_lost(self, data):
        """The connection is broken: `data` will never be sent."""
        self.lost += data
        if len(self.lost) > 2 * self.limit:
            self.lost_lines += self.lost.count(b"\n", 0, len(self.lost) - self.limit)
            self.lost = self.lost[-self.limit:]

    def trim(self):
        """Forget what was acknowledged long ago, and of the others what is too much."""
        left = self.ask() + self.slack
        self._shorten(min(self.limit, left) + self.ADMITTED, left)

    def rest(self):
        """Nothing was sent for a while: forget what was acknowledged, but for the last lines."""
        if sum(map(len, self.chunks)) > self.RESTING and not self.ask():
            self._shorten(self.RESTING, 0)

    def _shorten(self, keep, left):
        """Leave at least `keep` bytes, from the start of a line; `left` are not acknowledged."""
        data = b"".join(self.chunks)
        start = data.rfind(b"\n", 0, max(0, len(data) - keep)) + 1
        start = start if len(data) - start <= 2 * keep else len(data) - keep
        gone, size, cut = data[:start], len(data) - start, self._cut
        self.chunks[:] = [data[start:]] if data else []
        if gone:
            self.whole = gone.endswith(b"\n")
        if left > size and gone:
            cut = (*cut, (len(gone), gone.count(b"\n")))
        while cut and left <= size + sum(size for size, _ in cut[1:]):
            cut = cut[1:]
        self._cut, self._grown = cut, 0
        self._many, self._much = max(MANY_CHUNKS, 2 * len(self.chunks)), max(MUCH, size)

    def _lost_of(self, left):
        """How many lines of the `left` bytes before those that are here are so not any more."""
        lines = 0
        for size, ends in reversed(self._cut):
            if left <= 0:
                break
            lines += ends * min(left, size) // size
            left -= size
        return lines

    def read(self, left, more=False, doubted=0):
        """(the last lines that were acknowledged, what was not: from the start of its line, how
        many lines of that are lost). `left` are not acknowledged; `more`: there is something that
        the kernel was not given; so many are `doubted`, at least."""
        self.journal.deliver()
        data = b"".join(self.chunks)
        start = max(0, len(data) - left)
        begin = data.rfind(b"\n", 0, start) + 1
        if left or self.lost or more:
            start = begin
        first = 0 if self.whole else min(data.find(b"\n") + 1 or begin, begin)
        doubted = data.count(b"\n", max(first, start - doubted), begin)
        admitted = data[first:begin].split(b"\n")[-1 - max(DOUBTFUL_LINES, doubted):]
        return (b"\n".join(admitted), data[start:] + self.lost,
                self._lost_of(left - len(data)) + self.lost_lines)


class _AtHand:
    """What each line that is relayed asks of a Stream. The slots of a base come first: so these
    stand together, and of a stream that others have pushed out of the processor's cache two lines
    have to be fetched, not four."""

    __slots__ = ("sock", "out", "on_data", "peeks", "chunk", "connecting", "recent")


class Stream(_AtHand):
    """One non-blocking socket in the hub's selector, and its out-buffer. Main thread only. What it
    is interested in is computed in one place; every close says which: finish() or drop().

    The owner is told by on_data(data), a bound method, and owner.on_stream_open(stream),
    on_stream_end(stream, reason), on_stream_full and on_stream_room (the out-buffer passed
    HIGH_WATER, fell below LOW_WATER). A failed send stops writing only; the stream ends when
    reading it does, so that last words are not lost.
    """

    HIGH, LOW = HIGH_WATER, LOW_WATER
    settled = True                 # see Absent

    __slots__ = ("selector", "owner", "ended", "closed", "full", "sent_bytes", "trail", "far",
                 "_paused", "_finishing", "_broken", "_interest")

    def __init__(self, selector, sock, owner, on_data, connecting=False, far=None):
        sock.setblocking(False)
        self.selector, self.sock, self.owner, self.on_data = selector, sock, owner, on_data
        self.peeks, self.chunk = False, CHUNK
        self.out = b""             # a bytearray while something waits to be sent
        self.connecting = connecting
        self.ended = self.closed = self.full = False
        self.sent_bytes = 0        # progress: counts while something waits only
        self.trail = self.recent = None         # see follow()
        self.far = far             # a FarEnd: in between lies the process that speaks TLS
        self._paused = self._finishing = self._broken = False
        self._interest = 0
        self._update()

    @classmethod
    def connect(cls, selector, target, owner, on_data):
        """Begin to connect to target = (family, address); OSError where that fails at once."""
        return cls(selector, begin_connect(target), owner, on_data, connecting=True)

    @property
    def wire(self):
        """The socket that leads to the peer's machine, None while that is not known."""
        return self.far.sock if self.far else self.sock

    def _update(self):
        """Tell the selector what is wanted, if that changed."""
        wanted = 0
        if not (self.closed or self.connecting):
            wanted = (WRITE if self.out else 0) | (0 if self._paused or self.ended else READ)
        elif not (self.closed or self.ended or self.far):       # who has that says it is open
            wanted = WRITE
        if wanted == self._interest:
            return
        if not wanted:
            self.selector.unregister(self.sock)
        elif not self._interest:
            self.selector.register(self.sock, wanted, self)
        else:
            self.selector.modify(self.sock, wanted, self)
        self._interest = wanted

    def ready(self, events):
        """The selector says that reading or writing would not block."""
        if events != READ:
            if events & WRITE:
                self._writable()
            if self.closed or not events & READ:
                return
        try:
            data = self._shown() if self.peeks else self.sock.recv(self.chunk)
        except NOT_NOW:
            return
        except OSError as error:
            self.end(error.strerror or str(error))
            return
        if data:
            on_data = self.on_data              # a call of what a slot holds costs twice as much
            on_data(data)
        else:
            self.end("")

    def _writable(self):
        if self.connecting:
            self._finish_connect()
        else:
            self._flush()

    def _finish_connect(self):
        error = connect_error(self.sock)
        if error:
            self.selector.unregister(self.sock)
            self._interest, self.closed = 0, True
            reset(self.sock)
            self.end(error.strerror)
        else:
            self.opened()

    def opened(self):
        """It is connected."""
        self.connecting = False
        self._update()
        self.owner.on_stream_open(self)

    def end(self, reason):
        """Nothing more comes; `reason` is "" if the other side just ended it."""
        self.ended = True
        self._update()
        if self.far:
            reason = self.far.why(reason)
        self.owner.on_stream_end(self, reason)

    def send(self, data):
        """Send now what the socket takes and keep the rest in order."""
        if self.out or self.connecting:
            self._hold(data)
            return
        try:
            sent = self.sock.send(data)
        except NOT_NOW:
            sent = 0
        except OSError:
            self._broken, sent = True, 0
        recent = self.recent
        if sent == len(data):
            if recent is None:
                return
            if sent <= SMALL_CHUNK and len(recent) < MANY_NOTES:
                recent.append(self.trail)
                recent.append(data)
                return
        if self.trail and sent:
            self.trail.add(data[:sent])
        self._hold(data[sent:])

    def _hold(self, data):
        if self._broken and self.trail:
            self.trail.add_lost(data)
        if self._broken or not data:
            return
        if not self.out:
            self.out = bytearray()
        self.out += data
        self._update()
        if len(self.out) > self.HIGH and not self.full:
            self.full = True
            self.owner.on_stream_full(self)

    def _flush(self):
        try:
            sent = self.sock.send(self.out) if self.out else 0
        except NOT_NOW:
            return
        except OSError:
            self._fail()
        else:
            self._took(sent)
        self._flushed()

    def _took(self, sent):
        """The kernel took so many bytes of what is held."""
        if self.trail:
            self.trail.add(bytes(self.out[:sent]))
        self.sent_bytes += sent
        del self.out[:sent]

    def _fail(self):
        """What is held will never be sent."""
        if self.trail:
            self.trail.add_lost(bytes(self.out))
        self._broken, self.out = True, b""

    def _flushed(self):
        if not self.out:
            self.out = b""
            if self._finishing:
                self._shut()
        if self.full and len(self.out) < self.LOW:
            self.full = False
            self.owner.on_stream_room(self)
        self._update()

    def pause(self):
        """Stop reading for now."""
        self._paused = True
        self._update()

    def resume(self):
        """Read again."""
        self._paused = False
        self._update()

    def finish(self):
        """Flush, then end the writing side. Reading goes on until the other ends; then drop()."""
        self._finishing, self._paused = True, False
        if not self.out:
            self._shut()
        self._update()

    def _shut(self):
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._broken = True                 # gone already; reading says so too

    def last_words(self):
        """Deliver what the other side sent before it ended, as far as it has arrived; note whether
        it has."""
        while not (self.closed or self.ended or self.connecting):
            try:
                data = self._shown() if self.peeks else self.sock.recv(self.chunk)
            except NOT_NOW:
                return
            except OSError:
                data = b""
            if data:
                self.on_data(data)
            else:
                self.ended = True
                self._update()

    def read_little(self):
        """Read no more at a time than may be written down in each turn while it waits: the rest
        waits in the kernel, which forgets nothing if this process dies."""
        self.chunk = LOOK_BYTES

    def rest_of_line(self):
        """What stands behind the last read up to the end of its line, if that is here: else the
        two parts of a line would be two turns' affair."""
        try:
            more = self.sock.recv(LOOK_BYTES, socket.MSG_PEEK)
        except OSError:                         # nothing, or the end: that will be heard
            return b""
        return self.sock.recv(more.find(b"\n") + 1)

    def peek(self, peeks):
        """Whether on_data(), which must be another now, is shown what came and must take() it: so
        nothing is lost if this process dies meanwhile. Returns whether it is another."""
        if peeks is self.peeks:
            return False
        self.peeks = peeks
        return True

    def _shown(self):
        return self.sock.recv(LOOK_BYTES, socket.MSG_PEEK)

    def take(self, size):
        """So much of what was shown has been dealt with."""
        if not self.closed:
            self.sock.recv(size)                # it is there

    def drop(self):
        """Close now. Harmless twice."""
        if not self.closed:
            self.follow(0)                      # while the socket can be asked
            self.closed, self.out = True, b""
            self._update()
            if self.far:
                self.far.leave()
            hang_up(self.sock)

    def follow(self, limit, journal=None):
        """From now on, while it is open, it leaves a trail of at most `limit` bytes; 0: none any
        more. `journal`: the one of all streams."""
        if limit and self.trail:
            self.trail.limit = limit
            return
        if self.trail:
            self.trail.journal.deliver()
        self.trail = self.recent = None
        if limit:
            # the process between has read so much, and not yet sent
            slack = TLS_RECORD if self.far else 0
            self.trail = Trail(limit, self.unacknowledged, slack, journal)
            self.recent = self.trail.journal.recent

    def unacknowledged(self):
        """How many bytes are not acknowledged; at most so many, where TLS lies between."""
        if not self.far:
            return unacknowledged(self.sock)
        if not self.far.sock:
            return self.trail.limit             # nobody has said yet
        return unacknowledged(self.sock) + unacknowledged(self.far.sock)

    def pack(self, name, held=True):
        """What a new process needs to go on with this stream: `name` says under which name it will
        find a socket. `held`: with what waits to be sent."""
        return {"fd": name(self.sock), "out": pack(bytes(self.out) if held else b""),
                "ended": self.ended, "finishing": self._finishing, "broken": self._broken,
                "far": self.far and self.far.name}

    @property
    def marks(self):
        """What of that changes, but for what is held."""
        return self.ended, self._finishing, self._broken

    def take_up(self, packed):
        """Go on where the packed stream was."""
        self.out = bytearray(unpack(packed["out"])) or b""
        self.ended, self._finishing = packed["ended"], packed["finishing"]
        self._broken = packed["broken"]
        self._update()
        if len(self.out) > HIGH_WATER:
            self.full = True
            self.owner.on_stream_full(self)


class Lone:
    """Has one `stream` of its own, in which all that is sent may wait, and ends with it; after a
    fault of HAS in serving it (it was logged), too, alone."""

    def on_stream_full(self, stream):
        """Nothing is to be paused."""

    on_stream_room = on_stream_full

    def on_stream_end(self, stream, reason):
        self.drop()

    def on_error(self):
        self.drop()

    def drop(self):
        """Close it."""
        self.stream.drop()


class FarEnd:
    """What the worker knows of the far end of a stream whose peer speaks TLS: the process between
    them (KnownFront) has the connection, and says how it goes."""

    __slots__ = ("front", "name", "sock", "told", "_why", "_is_left")
    LOST = "the process that speaks TLS has ended"

    def __init__(self, front, number):
        self.front, self.name, self._is_left = front, (front.name, number), False
        self.sock = None           # a copy of the TCP socket that leads to the peer
        self.told = None           # called with how much of what was sent has not been acknowledged
        self._why = None           # it has ended, for this reason

    def take(self, sock):
        """This is that copy."""
        if self._is_left or self.sock:
            sock.close()
        else:
            self.sock = sock

    def ended(self, why):
        """It has ended; the stream itself does so behind that."""
        self._why = self._why or why

    def why(self, reason):
        """Why the stream has ended, which says `reason` itself."""
        if self._why is None:
            self.front.hear()                   # it was said before
        return self.LOST if self._why is None else self._why or reason

    def over(self, unseen):
        """The process between has read all that was sent here; `unseen` bytes of that have not been
        acknowledged. None: it has died."""
        told, self.told = self.told, None
        if told:
            told(unseen)

    def leave(self):
        """The stream is closed now, not only for writing."""
        self._is_left = True
        self.front.left(self.name[1])
        if self.sock:
            self.sock.close()
            self.sock = None


class Channel:
    """Messages between two processes, plain values and descriptors, over one end of a socketpair.
    Never blocks: what does not fit waits. Its owner has on_message(descriptors, message) and
    on_channel_end()."""

    MOST = 2                       # descriptors of a message
    closed = False

    def __init__(self, selector, sock, owner):
        sock.setblocking(False)
        self._selector, self.sock, self.owner, self._interest = selector, sock, owner, READ
        self.waiting = collections.deque()     # [bytes, message, descriptors, then]
        self._came, self._rights = b"", collections.deque()
        selector.register(sock, READ, self)

    def send(self, message, fds=(), then=None):
        """Send it, with descriptors, which are closed; call `then` when it was sent. A message that
        comes without them could not have them."""
        self.waiting.append([self._line(message, fds), message, fds, then])
        self._flush()

    @staticmethod
    def _line(message, fds):
        return json.dumps({**message, "fds": len(fds)}).encode() + b"\n"

    def _flush(self):
        while self.waiting and self._send_one():
            pass
        wanted = READ | (WRITE if self.waiting else 0)
        if not self.closed and wanted != self._interest:
            self._selector.modify(self.sock, wanted, self)
            self._interest = wanted

    def _send_one(self):
        """Send the message that waits first; whether it is gone."""
        it = self.waiting[0]
        line, message, fds, then = it
        rights = struct.pack(f"{len(fds)}i", *fds)
        try:
            sent = self.sock.sendmsg(
                [line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else [])
        except NOT_NOW:
            return False
        except OSError:             # too many in flight; or nobody is there, which will be heard
            sent = 0 if fds else len(line)
            it[0] = self._line(message, ())
        else:
            it[0] = line[sent:]
        it[2] = ()
        for fd in fds:
            os.close(fd)
        if sent == len(line):
            self.waiting.popleft()
            if then:
                then()
        return True

    def ready(self, events):
        """The selector says that reading or writing would not block."""
        if events & WRITE:
            self._flush()
        if events & READ:
            for fds, message in self.read() or ():
                self.owner.on_message(fds, message)

    def read(self):
        """What has come, as a list of (descriptors, message), or None: nothing."""
        try:
            data, control, flags, _ = self.sock.recvmsg(
                CHUNK, socket.CMSG_SPACE(4 * self.MOST), getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        except NOT_NOW:
            return None
        except OSError:
            data, control, flags = b"", [], 0
        if not data:
            self._end()
            return None
        if control or flags & socket.MSG_CTRUNC:            # of one message at most (unix(7))
            rights = control[0][2] if control else b""
            self._rights.append([fd for fd, in struct.iter_unpack("i", rights)])
        *lines, self._came = (self._came + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        return [(self._rights.popleft() if it.pop("fds") else (), it) for it in messages]

    def dispatch(self, name, handed, values, what):
        """Have the owner's _on_NAME(handed, **values) deal with `what` a message says."""
        handle = getattr(self.owner, "_on_" + name, None)
        try:
            if handle:                          # else the other program is newer
                handle(handed, **values)
        except Exception:
            log.exception("a fault of HAS in %s; all else goes on", what)

    def _end(self):
        if not self.closed:
            self.close()
            self.owner.on_channel_end()

    def close(self):
        """Close our end. Harmless twice."""
        if not self.closed:
            self.closed = True
            self._selector.unregister(self.sock)
            self.sock.close()
            for _, _, fds, _ in self.waiting:
                for fd in fds:
                    os.close(fd)
            self.waiting.clear()


# ======================================================================
# 6. Session
#
# One user: a client stream, a link to the world, and what must be remembered
# to bring him back. Every rule that a user can see is in this part:
#
#   Character   who he is for the world, was, and may be again
#   Screen      everything his client is shown
#   Telnet      the negotiation between his client and one world after another
#   Inbox       everything his client sends: what may be read now, what later
#   Lines       what each line he types means
#   Return      his way back into the world
#   Hold        how long he waits, and what he is told of it
#   Feed        everything the world sends
#   Opening     the opening of links, one after another
#   Place       where he is kept while his own line is down (Absent, Claim)
#   Session     the states between which all this moves
# ======================================================================

KEEP_BYTES = 8192                  # typed text kept while a link opens or a verdict is awaited
RETURN_SECONDS = 10                # last resort where no end marker comes
CONNECT_SECONDS = 10
FLUSH_SECONDS = 10                 # who is being closed has so long to take what is held
ANSWER_SECONDS = 30                # an answer that nobody else waits for is awaited for so long
OFFERS_SECONDS = 10                # a server's own offers come no later than this on a new link
LATE_SECONDS = 2                   # ... and its first telnet command no later than this
QUIT_SECONDS = 10                  # a link that ends this soon after QUIT was quit
STUCK_SECONDS, GIVE_UP_SECONDS = 2, 600        # a client that does not read: link runs on; closed
EXPECT_SECONDS = 5                 # the world answers a setting that HAS repeats sooner than that
HIDE_SECONDS = 0.3                 # the rest of a line that may be an arrival comes sooner
MARK_SECONDS = 60                  # marks come no later than this after a login
NEXT_LINE_SECONDS = 0.1            # between lines typed during a return, if the world says nothing
TELL_FAILURE_SECONDS = 5           # a world that takes no link for so long: its users are told
PLACE_LOOK_SECONDS = 10            # a HUP may have brought another reattach
PLACE_POLL_SECONDS, PLACE_TRIES = 0.1, 100      # a place whose session is just coming back
SETTLE_TRIES = 2                   # ... and so many while the new client's telnet is under way
CLAIM_SECONDS = 15                 # who has opened a place waits for no longer than that
CHECK_SECONDS = 2                  # ... for the heartbeat's answer about his password
LIFE_SECONDS, LIFE_POLL_SECONDS = 2.5, 0.02     # two probes of a mobile line
TICK_SECONDS = 0.01                # the kernel counts no finer
TRAIL_REST_SECONDS = 10
# Of what is missed: written down in case that HAS dies, of each at least and of all; in pieces.
WRITTEN_BYTES, WRITTEN_OF_ALL, MOST_PIECES = 16384, 16 << 20, 64
UNSENT_LINES = 10                  # answered one by one in a second; of the rest only the number
NOTHING = {}


class State(enum.Enum):
    """What a session is doing; Session.TABLE has what happens in which of them."""

    __hash__ = object.__hash__     # each event is looked up; Enum's own is a call of Python

    OPENING = "its first link is being opened"
    LOGIN = "at the login screen"
    PLAYING = "in the game"
    ASKING = "asking why the link ended"
    WAITING = "waiting for the world"
    BACKOFF = "waiting for the next try of a link"
    REOPENING = "a link for a return is being opened"
    RETURNING = "being logged in again"
    CLOSING = "closing"


AT_LOGIN = {State.OPENING, State.LOGIN}
AWAY = {State.WAITING, State.BACKOFF}           # what he types now is not sent
COMING_BACK = {State.REOPENING, State.RETURNING}
LINKED = {State.LOGIN, State.PLAYING}           # he and the world can talk
PLACES_TO_TAKE = {State.PLAYING} | AWAY         # a user who was away can go on in these
PLACES = {State.ASKING} | PLACES_TO_TAKE | COMING_BACK


class Event(enum.Enum):
    """What happens to a session, other than text."""

    __hash__ = object.__hash__

    TURN = "its turn to connect to the world"
    OPENED = "the link is open"
    FAILED = "the link did not open"
    ENDED = "the open link ended"
    LEFT = "verdict: the user left"
    DIED = "verdict: the world died"
    DOWN = "the world is down or has moved"
    RETRY = "the world may take a link"
    TOOK = "the login he typed took"
    MARKED = "the end marker of his return came"
    OVERDUE = "... did not come in time"
    LOGOUT = "he has logged out to the login screen"
    CLIENT_ENDED = "the client ended its side"
    CLIENT_LOST = "the client's connection broke"


def end_of_nth(ends, data, count):
    """Where in `data` the part with its first `count` bytes of `ends` stops; CR LF is one."""
    if count <= 0:
        return 0
    if len(data) - len(data.translate(None, ends)) <= count:
        return len(data)
    found = re.finditer(rb"\r\n|[" + ends + rb"]", data)
    return next((end.end() for end in itertools.islice(found, count - 1, None)), len(data))


# PennMUSH serves pages and the websocket of browsers (worlds/pennmush.md a); whoever asks for that
# speaks no telnet.
_HTTP_REQUEST = re.compile(
    rb"(?:GET|HEAD|POST|PUT|DELETE|UPDATE|PATCH|OPTIONS) [^\r\n]* HTTP/\d\.\d\r?\n")
# One that came whole and asks for a page: what follows cannot be frames (RFC 6455 4.1).
_PAGE_REQUEST = re.compile(rb"(?is)(?!.*websocket).*?\n\r?\n")
TOO_MANY = (b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: %d\r\nContent-Length: 0\r\n"
            b"Connection: close\r\n\r\n")              # RFC 6585 4


@survives
class FirstLine:
    """Tells from a client's first line, as it comes in pieces, whether it is a browser."""

    __slots__ = ("is_http", "is_raw", "begun")

    def __init__(self, is_http=None):
        self.is_http = is_http     # None: not known yet
        self.is_raw = False        # ... and the server takes nothing that follows for typed lines
        self.begun = b""

    def feed(self, data, served):
        """Take what the client sends first, while is_http is None. `served`: the server speaks
        HTTP; it does so only with a request that came in one piece (worlds/bytes.md 3)."""
        whole = not self.begun
        self.begun += data[:KEEP_BYTES]
        if b"\n" in self.begun or len(self.begun) >= KEEP_BYTES:
            self.is_http, self.begun = bool(_HTTP_REQUEST.match(self.begun)), b""
            self.is_raw = self.is_http and whole and served


TYPED_LINE = FirstLine(is_http=False)           # of all the others


def shorten(out, limit, lost):
    """Cut the oldest whole lines not yet begun from `out`, the bytes held for a client, to leave
    `limit` bytes. One visible line says how many were lost; telnet commands are kept."""
    begun = out.find(b"\n", 0, limit // 2) + 1
    begun -= len(_unfinished_command(out[:begun]))
    start = out.find(b"\n", len(out) - limit) + 1 or len(out) - limit
    cut = bytes(out[begun:start])
    kept = b"".join(piece for is_command, piece in Scanner().feed(cut) if is_command)
    return out[:begun] + kept + lost(cut) + _unfinished_command(cut) + out[start:]


def _unfinished_command(data):
    scanner = Scanner()
    scanner.feed(bytes(data))
    return scanner.held


def ago(seconds):
    """A duration in seconds as people write it."""
    seconds = max(0, int(seconds))              # the clock of the machine may be put back
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    return f"{days}d {hours}h" if days else f"{hours}h {minutes}m" if hours else (
        f"{minutes}m {seconds % 60}s" if minutes else f"{seconds}s")


def session_line(it):
    """What is told of a session (Session.status) as a line of a list."""
    is_tls, quiet = "yes" if it["tls"] else "no", it["away"] or it["idle"]
    return _COLUMNS.format(it["id"], it["name"][:16], it["host"], it["state"], ago(it["age"]),
                           ago(quiet), it["bytes_in"], it["bytes_out"], is_tls, it["size"])


_COLUMNS = "{:>5} {:<16} {:<24} {:<10} {:<8} {:<8} {:<8} {:<8} {:<3} {}"


def listed(lines, heading=LIST_HEADING_NOTICE):
    """Such lines with their heading, if there are any."""
    return [_COLUMNS.format(*heading.split()), *lines] if lines else []


def status_lines(status):
    """The status (Control.status) as lines of text for people."""
    world, outages = status["world"], status["outages"]
    last = f", the last {ago(outages['last'])} ago" if outages["count"] else ""
    pid, worker = status["pid"], status["worker"]
    pids = f"pid {pid}" if pid == worker else f"pid {pid} (worker {worker})"
    how = "up (without heartbeat login)" if world["health"] == "blind" else world["health"]
    lines = [f"{pids}: HAS {status['version']}, up {ago(status['age'])}: the world "
             f"{world['address']} ({world['family'] or 'family unknown'}) is {how} for "
             f"{ago(world['since'])}",
             f"heartbeat: {world['heartbeat']}; outages: {outages['count']}, "
             f"{ago(outages['seconds'])} in all{last}"]
    if world["wanted"]:
        lines.append(f"the settings ask in vain for {world['wanted']}")
    if status.get("maintenance"):
        lines.append(f"maintenance: {status['maintenance']}")
    denied = [f"{network} {'for ' + ago(left) if left else 'until HAS stops'}"
              for network, left in status.get("denied", {}).items()]
    if denied:
        lines.append(f"denied: {', '.join(denied)}")
    return lines + listed(list(map(session_line, status.get("sessions", ()))))


@survives
class Noise:
    """Lines that tell everybody of users whom HAS itself brings back, hidden for a while."""

    _LINE = re.compile(rb"(?m)^([^\n]{1,60}?) has (?:re-?|partially dis|dis)?connected\.\r?\n")

    ELSEWHERE = __slots__ = ("_names",)         # see Links.arrivals_text

    def __init__(self):
        self._names = {}           # in lower case -> until when

    def __bool__(self):
        return bool(self._names)

    def expect(self, name, until):
        """Hide such lines about `name` until then."""
        self._names[name] = until

    def forget(self, now):
        """Forget whose time is over; return when that will be so of the next, or None."""
        self._names = {name: until for name, until in self._names.items() if until > now}
        return min(self._names.values(), default=None)

    def may_begin(self, tail):
        """Whether an unfinished line could become one that is hidden."""
        name, has, _ = tail.lower().partition(b" has ")
        if not self._names or not tail or len(tail) >= 80:
            return False
        if has:
            return name in self._names
        return any((known + b" has ").startswith(name) for known in self._names)

    @property
    def columns(self):
        """All of it as plain values: the names, and the milliseconds until when."""
        return ([name.decode("latin-1") for name in self._names],
                [int(until * 1000) for until in self._names.values()])

    @columns.setter
    def columns(self, columns):
        self._names = {name.encode("latin-1"): until / 1000 for name, until in zip(*columns)}

    def removed(self, text):
        """`text`, which starts a line, without the lines that are hidden."""
        return self._LINE.sub(
            lambda line: b"" if line.group(1).lower() in self._names else line.group(), text)


class Character(Survivor):
    """Who a user is for the world, was, and may be again: pure, no streams, no clocks.

    `login` is confirmed. `previous`, and `older` (latest first), are the pairs before changes of
    name or password: kill -9 reverts a world to its last dump, which may be older than several.
    `doubtful` is the pair behind a change that was not answered, by a world that died, or to a HAS
    that died, or not in words of its own. `pending` was typed while no world could answer it.
    """

    MOST_OLDER = 2                 # each wrong one may cost a link, and count as a failed login
    __slots__ = SURVIVES = ("login", "previous", "doubtful", "pending", "unanswered", "trials",
                            "changing", "proven", "checked", "older")

    def __init__(self):
        # Credentials, or None
        self.login = self.previous = self.doubtful = self.pending = None
        self.older = []            # Credentials
        self.unanswered = []       # (login, typed at, greeted by then), neither taken nor refused
        self.trials = []           # Credentials to try on return, best first
        self.changing = None       # a Change typed and not yet answered by the world
        self.proven = b""          # the character as it logged in, whatever was typed later
        self.checked = None        # what the heartbeat was asked about: Credentials, or a list

    @property
    def name(self):
        """What admins read of who is logged in; "" for nobody."""
        return printable(self.login.name) if self.login else ""

    @property
    def is_guest(self):
        """Whether he is logged in as a guest: another one may have that name the next time."""
        return self.login is not None and self.login.is_guest

    def who(self, number, coming):
        """Who this is for the world: a character; `number` where no name tells him from others."""
        login = self.trials[0] if coming and self.trials else self.login
        return login.character if login and login.character != b"guest" else number

    def would_be(self, number):
        """The same for one who has not begun to come back."""
        login = self.login or self.pending
        return login.character if login and not login.is_guest else number

    def opens_with(self, login):
        """Whether `login`, as typed now, is his own: all forms of connect are one, `cd` and the
        like are others, for who wants to come dark must not find himself visible."""
        own = self.login
        return bool(own and own.kind == login.kind
                    and secrets.compare_digest(own.character, login.character)
                    & secrets.compare_digest(own.password, login.password))

    # ---- at the login screen

    def type(self, login, now, greeted):
        """A login goes on to the world; `greeted`: it has said something on this link."""
        self.unanswered = self.unanswered[-7:] + [(login, now, greeted)]

    def answered(self, refusals, others, final):
        """The world has refused so many logins for good, others for now; `final`: it means it."""
        del self.unanswered[:refusals + others]
        if refusals and final:
            self.pending = None

    def took(self, login, others, proven):
        """A typed login took; `proven`: beyond doubt. Returns the pairs that may be right."""
        login, others = login.made, [other.made for other in others]
        self.is_now(login, others[-1] if others else None)
        self.pending, self.doubtful, self.unanswered = None, None, []
        self.proven = login.character if proven else b""
        return [login, *others]

    def confirm(self, verdicts, others):
        """The heartbeat's second proof of a typed login, and of `others` typed right behind it;
        whether that one was denied."""
        asked, self.checked = self.checked, None
        if not self.login or self.changing or self.login != asked:      # changed meanwhile
            return False
        right = [pair for pair, verdict in zip([self.login, *others], verdicts) if verdict]
        if right:
            self.is_now(right[0])
            self.proven = right[0].character
        return not right and verdicts[0] is False

    def forget(self, pending=None):
        """Nobody is logged in here; `pending` is for the world's next life."""
        self.is_now(None)
        self.doubtful = self.checked = None
        self.pending, self.trials, self.proven = pending, [], b""

    def log_out(self):
        """LOGOUT, by a line that the world has read."""
        self.forget(self.pending)
        self.unanswered = []

    # ---- in the game

    def change(self, kind, new, now):
        """A new password or name was typed; the world's answer comes within 30 s."""
        before = self.changing
        waiting = filter(None, (before, before and before.other))
        same = next((it for it in waiting if it.kind == kind), None)
        if same is None:
            self.changing = Change(kind, new, now + 30, before)
        elif len(same.behind) < Change.MOST_BEHIND:
            same.behind += (new,)
            before.until = now + 30

    def is_now(self, login, previous=None):
        """`login` is the right pair, or nobody's: none before it may be it again but `previous`."""
        self.login, self.previous, self.older = login, previous, []

    def became(self, login, before=None):
        """`login` is the right pair now; those until now (`before` the latest) may be it again."""
        former = []
        for pair in (before, self.login, self.previous, *self.older):
            if pair and pair != login and pair not in former:
                former.append(pair)
        self.login, self.previous = login, former[0] if former else None
        self.older = former[1:1 + self.MOST_OLDER]

    def may_have(self, password):
        """He may have this one now: the world's answer is the same as to other lines."""
        if self.login:
            self.doubtful = Credentials(self.login.verb, self.login.name, password)

    def follow_change(self, dialect, text):
        """Text of the world while changes are asked for; those that it confirms, each with what
        the login was before."""
        last, before, confirmed, left = self.changing, self.login, [], []
        for change in filter(None, (last.other, last)):
            changed = change.outcome(dialect, text)
            while changed is not None:
                if changed and self.login:
                    confirmed.append((change, self.login))
                    self.became(change.of(self.login), before)
                    self.doubtful = None
                change = change.next()
                changed = change.outcome(dialect, b"") if change else None
            left += [change] * (change is not None)
        self.changing = left[-1] if left else None
        if left:
            left[-1].other = left[0] if len(left) > 1 else None
            left[-1].until = last.until
        return confirmed

    def give_up_change(self):
        """No answer comes any more to what he has typed: perhaps it was done."""
        change, self.changing = self.changing, None
        if change and self.login:
            before = change.other.last_of(self.login) if change.other else self.login
            self.doubtful = change.last_of(before)

    # ---- while the world is away

    def keep_unanswered(self, now, spoke_at, braked):
        """The world died: a login it has not answered, or that was held back, is for the next.

        It is answered if the world spoke behind it, in words of its own (sites edit them): whom
        it has greeted it tells nothing unasked. A second: time for the mark behind a success.
        """
        if self.unanswered and not self.login:
            login, typed_at, greeted = self.unanswered[-1]
            if now - typed_at < 30 and not (greeted and typed_at < spoke_at < now - 1):
                self.pending = login
        if braked and not self.login:
            self.pending = braked
        self.unanswered = []

    def type_while_away(self, login):
        """A login typed while no world is there, for the next one; who is in keeps his own."""
        if not self.login or self.is_guest:
            self.login = None
            self.pending, self.trials = login, [login]  # trials: a return may have begun already

    def plan_return(self, logs_in):
        """The pairs to try, best first: none for guests, nor where nobody logs in."""
        self.give_up_change()
        pairs = [self.login or self.pending, self.previous, self.doubtful, *self.older]
        pairs = [pair for number, pair in enumerate(pairs) if pair and pair not in pairs[:number]]
        self.trials = pairs if logs_in and not self.is_guest else []

    def must_be_checked(self, counts_failures):
        """Whether to ask first which pair is right. Who does not exist yet, or needs no password,
        is always wrong."""
        first = self.trials[0] if self.trials else None
        return bool(first) and bool(first.password) and not (first.creates or first.is_guest) and (
            len(self.trials) > 1 or counts_failures)

    @property
    def is_asked_for_another(self):
        """Whether a login was typed since the heartbeat was asked."""
        return any(pair not in self.checked for pair in self.trials)

    def choose(self, verdicts, counts_failures):
        """The heartbeat's answer about `trials`; False: none is right, and a try would count."""
        right = [pair for pair, verdict in zip(self.checked, verdicts) if verdict is not False]
        if not right and counts_failures:
            return False
        self.trials = right or self.trials[:1]
        return True

    def came_back(self, login):
        """This pair took. Returns (whether it is his first login, whether a change was lost)."""
        login, first = login.made, self.login is None
        lost_change = login in (self.previous, *self.older)
        self.became(login)
        self.pending, self.checked, self.doubtful = None, None, None
        self.proven = login.character
        return first, lost_change

    def was_answered_in_words(self):
        """The world ended the link of a return with words: a create, or a guest, is sent once."""
        if self.trials[0].creates or self.trials[0].is_guest:
            self.trials, self.pending = [], None


class Part(Survivor):
    """A room of a session; a fault in it ends that session only (see Loop.fault). In a new process
    go_on() begins anew what was under way in the old one."""

    __slots__ = ("session", "hub")

    def __init__(self, session):
        self.session, self.hub = session, session.hub


class Screen(Part):
    """What a client is shown: the world's text, and notices between its lines (rule 10)."""

    SURVIVES = ("bytes_out", "tail", "notices", "hidden", "expected", "spelling", "stuck_due")
    __slots__ = SURVIVES + ("client", "careful", "stuck", "watching", "batch")
    PASSING = ("bytes_out", "tail", "stuck_due")

    def __init__(self, session, client):
        super().__init__(session)
        self.client = client
        self.careful = False       # whether what the world sends must be read: see Proof.live
        self.bytes_out = 0
        self.tail = b""            # the unfinished line the client was sent last
        self.notices = []          # (text, more), waiting for the end of that line
        self.hidden = b""          # a tail that could begin an arrival line
        self.expected = []         # lines: the world's answers to settings that HAS repeats
        self.spelling = PLAIN_SPELLING          # how notices are written for him
        self.stuck = False         # the client does not read, and the link runs on
        self.stuck_due = 0
        self.watching = False      # a timer looks whether the client reads at all
        self.batch = None          # what is to be sent in one piece; None: send at once

    # ---- the world's text

    def choose_path(self):
        """Compute the two flags of the fast path from all they depend on."""
        session = self.session
        state, inbox = session.state, session.inbox
        fast = (state is State.PLAYING and session.linked and inbox.is_fast
                and not session.hold.silent and not session.dialect.capped)
        inbox.forward = session.link if fast else None
        inbox.peek.update(state)
        proof = session.feed.proof
        self.careful = bool(
            state in (State.LOGIN, State.RETURNING) or self.stuck or self.hidden or self.expected
            or session.hub.links.noise or inbox.kept or session.character.changing
            or session.telnet.is_held) or bool(proof) and proof.live

    def on_link_data(self, data):
        """The world sent `data`: the fast path."""
        self.bytes_out += len(data)
        careful = self.careful     # IAC is a number: b"\xff" costs an exception in Python
        if careful and (careful is True or careful in data) or IAC in data:
            self.session.feed.read(data)
            return
        if data[-1] != 10:
            self.tail = (self.tail + data[-200:])[-200:].rpartition(b"\n")[2]
        elif self.tail:
            self.end_line(data)
            return
        self.client.send(data)

    def on_plain_data(self, data):
        """The same as long as the world has sent no escape."""
        if ESCAPE in data and self.careful is not True:     # else show() sees it, if it is shown
            self._note_colour()
        self.on_link_data(data)

    def on_raw_data(self, data):
        """The same for a client that speaks HTTP."""
        self.bytes_out += len(data)
        self.client.send(data)
        self.session.hub.links.spoke(self.session)
        self.session.arrived()
        if len(self.client.out) > self.session.hub.settings.output_limit:
            self.session.close(
                "takes too little of what the world sends, and nothing can be left out")

    @property
    def reader(self):
        """What takes the data of the link."""
        if self.session.inbox.first.is_raw:
            return self.on_raw_data
        if self.session.link and self.session.link.peeks:
            return self.session.inbox.peek.on_link_data
        return self.on_link_data if self.spelling.coloured else self.on_plain_data

    def _note_colour(self):
        self.spelling = Spelling(True, self.spelling.marked_up)
        self.session.hub.changed.add(self.session)
        if self.session.link:
            self.session.link.on_data = self.reader

    def end_line(self, data):
        """Send text that ends a line; then it is the notices' turn."""
        self.tail = b""
        self.send(data)
        if self.notices:
            self.flush()

    def show(self, text):
        """Send text of the world."""
        if not text:
            return
        if ESCAPE in text and not self.spelling.coloured:
            self._note_colour()
        if text.endswith(b"\n"):
            self.end_line(text)
        else:
            self.tail = (self.tail + text)[-200:].rpartition(b"\n")[2]
            self.send(text)

    def send(self, data):
        """Send bytes that are no text, or were looked at."""
        if self.batch is None:
            self.client.send(data)
        elif data:
            self.batch.append(data)

    def in_one_piece(self, read, data):
        """Do read(data); what that sends goes out behind it: each send costs others time."""
        if self.batch is not None:              # as part of another
            read(data)
            return
        self.batch = []
        try:
            read(data)
        finally:
            self.end_batch()

    def end_batch(self):
        """Send what waits to be sent in one piece."""
        batch, self.batch = self.batch, None
        if batch:
            self.client.send(b"".join(batch))

    # ---- notices

    def notify(self, text, more=b""):
        """Write a notice between lines: at once, or after the line the world is sending now, at
        most 1 s later. `more` are bytes for its last line."""
        session = self.session
        if not text or session.state is State.CLOSING:
            return
        if self.tail and session.linked and session.state is not State.RETURNING:
            if not self.notices:
                session.later(1, self.flush)
            self.notices.append((text, more))
        else:
            self.write(text, more)

    def answer(self, text, more=b""):
        """Answer a line he typed; not one who types and does not read: what is held has a bound."""
        if not self.client.full:
            self.notify(text, more)

    def spell(self, text):
        """A line of HAS's own."""
        return self.spelling.spell(text, self.session.telnet.codec) + b"\r\n"

    def flush(self):
        """Write the notices that wait."""
        notices, self.notices = self.notices, []
        for notice in notices:                  # a str: an older HAS's
            self.write(*((notice,) if isinstance(notice, str) else notice))
        if notices:
            self.session.hub.changed.add(self.session)

    def write(self, text, more=b""):
        """Write a notice on a fresh line, colour reset, whatever the world left unfinished."""
        if not text or self.session.inbox.first.is_http:
            return
        telnet = self.session.telnet
        lines = self.spelling.spell(text, telnet.codec, more)
        begun = self.spelling.end(self.tail) + b"\r\n" if self.tail else self.spelling.reset()
        self.send(telnet.break_off() + begun + lines + b"\r\n")
        self.tail = b""

    def go_on(self):
        self.flush()
        if self.expected:
            self.expect(self.expected)
        if self.hidden:
            self.show_hidden()

    # ---- lines that are not for him

    def expect(self, lines):
        """These will come back from the world as answers to lines of HAS."""
        self.expected = lines
        self.session.later(EXPECT_SECONDS, self.expected.clear)

    def without_hidden(self, text):
        """`text` without arrivals of those HAS brings back (rule 6), or answers to its lines."""
        noise = self.session.hub.links.noise
        if not text or not (noise or self.hidden or self.expected):
            return text
        text, self.hidden = self.hidden + text, b""
        start = text.find(b"\n") + 1 or len(text) if self.tail else 0
        cut = max(start, text.rfind(b"\n") + 1)
        tail = text[cut:]
        if noise.may_begin(tail) or tail and any(it.startswith(tail) for it in self.expected):
            self.session.later(HIDE_SECONDS, self.show_hidden)
            text, self.hidden = text[:cut], text[cut:]
        return text[:start] + noise.removed(self._without_expected(text[start:]))

    def _without_expected(self, text):
        """`text`, which starts a line, without the first whole line like each expected one."""
        for line in list(self.expected):
            found = re.search(rb"(?m)^" + re.escape(line), text)
            if found:
                self.expected.remove(line)
                text = text[:found.start()] + text[found.end():]
        return text

    def show_hidden(self):
        """The beginning of a line was no arrival."""
        hidden, self.hidden = self.hidden, b""
        if hidden:
            self.show(hidden)
            self.session.refresh()

    # ---- a client that does not read

    def on_full(self):
        """The client holds more than HIGH_WATER: the link is read no more, for a while."""
        session = self.session
        if not self.watching:
            self.watching = True
            session.hub.later(GIVE_UP_SECONDS, self._watch, self.client, self.client.sent_bytes)
        if session.link:
            session.link.pause()
            self.stuck_due = session.hub.now + STUCK_SECONDS
            session.later(STUCK_SECONDS, self._run_on)

    def _run_on(self):
        """One unread connection freezes a whole TeenyMUSH: read on, lose old lines if need be."""
        session = self.session
        if self.client.full and session.link and session.hub.now >= self.stuck_due:
            self.stuck = True
            session.link.resume()
            session.refresh()

    def _watch(self, client, sent_bytes):
        if client is not self.client:           # another one has come meanwhile
            return
        self.watching = self.client.full and not self.client.closed
        if self.watching and self.client.sent_bytes == sent_bytes:
            log.info("%s: the client has not read for %d s: closed", self.session, GIVE_UP_SECONDS)
            if not self.session.place.keep("it does not read", doubtful=True):
                self.session.end()
        elif self.watching:
            self.session.hub.later(GIVE_UP_SECONDS, self._watch, client, client.sent_bytes)

    def shorten(self):
        """Keep what is held for a client that does not read within output_limit."""
        limit, client = self.session.hub.settings.output_limit, self.client
        if self.stuck and len(client.out) > limit:
            client.out = shorten(client.out, limit * 3 // 4, self._lost)

    def _lost(self, cut):
        """What is shown in place of `cut`."""
        notice = self.session.hub.settings.output_lost_notice
        return self.spelling.lost(cut, notice, self.session.telnet.codec)

    def take_client(self, client):
        """This one is shown everything from now on; the other's pauses are over."""
        self.client, self.stuck, self.watching = client, False, False
        if self.session.link:
            self.session.link.resume()
        if client.full:
            self.on_full()

    def on_room(self):
        """The client has taken enough: its link is read again."""
        if self.session.link:
            self.stuck = False
            self.session.link.resume()


# What servers assume of a client that tells nothing (RFC 1073: 78 by 24 is theirs, not the RFC's).
NAWS_UNKNOWN = bytes((IAC, SB, NAWS, 0, 78, 0, 24, IAC, SE))
TTYPE_UNKNOWN = bytes((IAC, SB, TTYPE, 0)) + b"UNKNOWN" + bytes((IAC, SE))
TTYPE_SEND = bytes((IAC, SB, TTYPE, 1, IAC, SE))
CHARSET_UNKNOWN = bytes((IAC, SB, CHARSET, CHARSET_ACCEPTED)) + b"ISO-8859-1" + bytes((IAC, SE))
DETAILED = (NAWS, TTYPE, CHARSET)  # ... of these: what is said behind the yes can be said again


class Telnet(Part):
    """Negotiation between one client and one world after another (RFC 854, 855, 1143): what was
    agreed is remembered, and HAS answers where no world does."""

    SURVIVES = ("agreement", "replay", "from_world", "had")
    __slots__ = SURVIVES + ("quiet",)

    def __init__(self, session):
        super().__init__(session)
        self.agreement = None      # what this client agreed with its worlds; None: never a command
        self.replay = None         # how that is brought to the present link; None: no need
        self.quiet = set()         # commands of the world that answer HAS and not the client
        self.had = set()           # of DETAILED, what this link has had on, for whatever client
        self.from_world = None        # splits what the world sends, once a command was in it

    @property
    def codec(self):
        """The character set for notices; None: not agreed."""
        return self.agreement.codec if self.agreement else None

    @property
    def is_held(self):
        """Whether a command of the world is not complete."""
        return bool(self.from_world and self.from_world.held)

    @property
    def waits(self):
        """Whether nothing may be sent yet on this link (see begin)."""
        return bool(self.replay and self.replay.waits)

    @property
    def size(self):
        """The client's window as people write it, "" if it never told (RFC 1073)."""
        size = unescape(self.agreement.naws) if self.agreement and self.agreement.naws else b""
        width, height = struct.unpack(">HH", size[3:7]) if len(size) == 9 else (0, 0)
        return f"{width}x{height}" if width else ""

    def _agree(self):
        self.agreement = self.agreement or Agreement()
        return self.agreement

    def _await_answers(self):
        """HAS has switched options off at the client. One that thought them off does not answer
        (RFC 1143 7): not awaited for ever, or it would lose what it says later."""
        if self.agreement and self.agreement.ignore:
            answers = frozenset(self.agreement.ignore)
            self.session.later_anyway(ANSWER_SECONDS, self._await_no_more, answers)

    def _await_no_more(self, answers):
        if self.agreement:
            self.agreement.ignore -= answers

    # ---- the client's commands

    def on_client_command(self, piece):
        """A command of the client; returns what the world gets of it."""
        session = self.session
        if len(piece) > 2 and piece[2] in UNREADABLE:
            if piece[1] in (DO, WILL):
                self._answer(declined(piece))
            return b""
        agreement = self._agree()
        is_news = len(piece) != 3 or agreement.changes(piece)
        wanted = agreement.from_client(piece)
        if not wanted and piece == command(WILL, TTYPE):
            self.session.screen.send(TTYPE_SEND)        # see _join_option
        if self._is_for_has(piece):
            if wanted and is_news:
                self.answer_for_world(piece)
        elif self._would_kill(piece):
            log.debug("%s: a DO CHARSET behind CHARSET ACCEPTED was not passed on", session)
        elif wanted and session.can_forward:
            if is_option(piece):
                if is_news:
                    agreement.ask(piece)
                if self.replay:
                    self.replay.spoke(piece)
            if not self.waits:
                session.inbox.typed.note_charset(session.dialect, piece)
                return piece
            self.replay.late += piece[:KEEP_BYTES - len(self.replay.late)]
        return b""

    def answer_asked(self, only=None):
        """Answer the client's requests (of `only`) for a world that does not: telnet(1) shows
        nothing until then. An answer that still comes is not passed on."""
        for piece in self.agreement.take_asked(only) if self.agreement else ():
            self.quiet.add(command(OFF[OTHER[SIDE[piece[1]]]], piece[2]))
            self.answer_for_world(piece)

    def _is_for_has(self, piece):
        """Whether HAS answers: no world that speaks telnet is there, or it is silent."""
        session, world = self.session, self.session.hub.world
        return (world and not world.dialect.telnet or session.state in AWAY
                or session.hold.silent and piece in ASKS_FOR_LIFE)

    def _would_kill(self, piece):
        """Whether this command would be the end of a PennMUSH (see Dialect.charset_once)."""
        if piece != command(DO, CHARSET) or not self.session.dialect.charset_once:
            return False
        # what HAS says in front of all that waits may hold an ACCEPTED
        return self.agreement.accepted or bool(self.waits and self.agreement.charset)

    def _answer(self, data):
        client = self.session.client
        if client.full:                         # it asks and does not read: nothing that asks more
            client.pause()
        else:
            self.session.screen.send(data)

    def answer_for_world(self, piece):
        """Answer the client for a server that cannot (RFC 1123 3.2.1), or does not just now. Its
        size, type and character set are for the next one."""
        if piece == AYT:
            notice = self.session.hub.settings.are_you_there_notice
            spelled = self.session.screen.spelling.spell(notice, self.codec)
            self._answer(b"\r\n" + spelled + b"\r\n" if notice else b"")
            return
        verb, option = piece[1], piece[2] if len(piece) == 3 else None
        if option is None:
            return
        if verb in (DO, DONT):
            self._answer_option(WONT, option)
        elif verb == WONT or verb == WILL and option not in DETAILED:
            self._answer_option(DONT, option)
        elif verb == WILL and self.session.dialect.telnet:
            self.agreement.unheard.add(option)
        elif verb == WILL:
            self._answer_option(DO, option)

    def _answer_option(self, verb, option):
        self._answer(command(verb, option))
        self._agree().from_world(command(verb, option))

    # ---- the world's commands

    def split(self, data):
        """What the world sent, as pieces (see Scanner.feed)."""
        if self.from_world is None and IAC in data:
            self.from_world = Scanner()
        scanner = self.from_world
        if scanner is None or not (scanner.held or scanner.inside_long or IAC in data):
            return [(False, data)]
        return scanner.feed(data)

    def on_world_command(self, piece):
        """A command of the world; returns what the client gets of it."""
        session = self.session
        if len(piece) > 2 and piece[2] in UNREADABLE:
            if piece[1] in (DO, WILL) and session.link:
                session.link.send(declined(piece))
            return b""
        if not session.dialect.telnet:
            return piece if len(piece) == 2 else b""    # GA after a prompt is for the client
        agreement = self._agree()
        if is_option(piece):
            agreement.asked.pop((OTHER[SIDE[piece[1]]], piece[2]), None)
        if piece in self.quiet:
            self.quiet.discard(piece)
            agreement.from_world(piece)
            return b""
        if self.replay:
            is_offer = is_option(piece)
            answer, piece = self.replay.answer(piece)
            if is_offer:
                self._await_answers()
            if answer and session.link:
                session.link.send(self._noted(answer))
            self.send_late()
        if piece:
            agreement.from_world(piece)
            if piece[2:4] == bytes((CHARSET, CHARSET_ACCEPTED)):
                self._noted(piece)              # what the client had asked for
        return piece

    def break_off(self):
        """What ends the world's long sub-negotiation, if the client is in the middle of one."""
        if not (self.from_world and self.from_world.inside_long):
            return b""
        self.from_world = None
        return bytes((IAC, SE))

    # ---- another world

    def new_link(self):
        """Nothing was said on this link yet."""
        self.from_world = self.replay = None
        self.quiet, self.had = set(), set()

    def begin(self, late):
        """Speak for the client on the new link; returns what goes in front of the login, nothing
        if `late`: PennMUSH takes telnet behind the address line on its unix socket for text, and
        a NUL cuts off the rest (choreography.md 2). Its own first telnet comes within a second,
        or at the first line."""
        session, agreement = self.session, self._agree()
        replay = Replay(agreement)
        if not session.dialect.telnet:          # then HAS itself takes these
            replay.met = {(WILL, option) for option in DETAILED}
            session.screen.send(replay.leftovers())
            self._await_answers()
            for _, option in agreement.pending():
                self._answer_option(DO, option)
            return b""
        self.replay, replay.waits = replay, late
        session.later(OFFERS_SECONDS, replay.grow_old)
        if not session.hub.world.telnet:
            return b""                          # an old TeenyMUSH takes it for text
        if not late:
            return self._noted(replay.opening())
        session.later(LATE_SECONDS, self.send_late)
        return b""

    def send_late(self):
        """Telnet is understood by now: send what waited for that."""
        replay, session = self.replay, self.session
        if replay and replay.waits and session.link:
            late, replay.late, replay.waits = replay.late, b"", False
            session.link.send(self._noted(replay.opening() + late))

    def _noted(self, sent):
        self.session.inbox.typed.note_charset(self.session.dialect, sent)
        return sent

    def leave_off(self):
        """Switch off at the client what the new world has not offered by now."""
        if self.replay:
            self.session.screen.send(self.replay.leftovers())
            self._await_answers()

    def end_echo(self):
        """No world is there to answer him, nor to echo what he types: his client must."""
        self.answer_asked()
        if self.agreement and self.agreement.settled(DO, ECHO):
            self.session.screen.send(Replay(self.agreement).leftovers({(DO, ECHO)}))
            self._await_answers()

    # ---- another client, the same world

    @property
    def is_settling(self):
        """Whether the world's first offers are still on their way to this client, or its answers:
        who logs in by program is faster."""
        session, agreement = self.session, self.agreement
        if not (session.state is State.LOGIN and session.dialect.telnet and session.linked):
            return False
        if not agreement:
            return not session.feed.spoke_at
        return any(on and (OTHER[verb], option) not in agreement.client
                   for (verb, option), on in agreement.world.items() if verb in OTHER)

    def join(self, agreement):
        """A new client stands at this link, with what it has settled elsewhere, or None: it has
        never sent a command. The link is not negotiated again where that is not needed: a second
        DO CHARSET kills a PennMUSH (worlds/pennmush.md)."""
        session = self.session
        old, new = self._agree(), agreement or Agreement()
        self.agreement = new
        if not (session.linked and session.dialect.telnet):
            return                              # the next link is the client's as well as ours
        self.had |= {option for option in DETAILED if old.settled(WILL, option)
                     or old.settled(DO, option) or (SB, option) in old.world}
        speaks = bool(new.client)
        keys = {(side, option) for side, option in [*old.client, *new.client]
                if option not in UNREADABLE and option != CHARSET}
        out = b"".join(self._join_option(key, old, new, speaks) for key in sorted(keys))
        out += self._join_charset(old, new)
        new.world = dict(old.world)
        new.accepted = old.accepted or bytes((IAC, SB, CHARSET, CHARSET_ACCEPTED)) in out
        self.replay = None
        self._await_answers()
        if self.quiet:
            session.later(ANSWER_SECONDS, self.quiet.clear)
        if out:
            session.link.send(self._noted(out))

    def _join_option(self, key, old, new, speaks):
        """What makes one option right for both; returns what goes to the link."""
        side, option = key
        was_on, on = old.settled(*key), new.settled(*key)
        details = side == WILL and option in self.had
        if on:
            begin = b"" if was_on or details else self._tell_link(key, old)
            return begin + self._joined_detail(option, new)
        if not (was_on or details):
            return b""
        if key not in new.client and (OTHER[side], option) not in new.world:
            self._ask_client(key, old, new, speaks)
            return b""
        if details:                             # it stays on, with what servers assume
            return TTYPE_UNKNOWN if option == TTYPE else NAWS_UNKNOWN
        new.client[key] = False
        self.quiet.add(command(OFF[OTHER[side]], option))
        return command(OFF[side], option)

    def _tell_link(self, key, old):
        """Switch an option on at the link; a no is for the client."""
        asked = (OTHER[key[0]], key[1])
        if not old.world.get(asked):            # else this is the answer
            self.quiet.add(command(*asked))
        return command(*key)

    @staticmethod
    def _joined_detail(option, new):
        known = {NAWS: new.naws or NAWS_UNKNOWN, TTYPE: (new.ttypes or [TTYPE_UNKNOWN])[0],
                 GMCP: b"".join(new.gmcp)}
        return known.get(option, b"")

    def _ask_client(self, key, old, new, speaks):
        """The world of its own link has not asked it: that is done now, and a yes is for nobody.
        One that has never sent a command is not asked; all stays as it was."""
        side, option = key
        new.client[key] = old.client.get(key, False)
        if speaks and side in OTHER:
            self.session.screen.send(command(OTHER[side], option))
            new.ignore.add(bytes((side, option)))
            new.client[key] = True
        elif option == NAWS:
            new.naws = old.naws
        elif option == TTYPE:
            new.ttypes = old.ttypes
        elif option == GMCP:
            new.gmcp, new.partly = old.gmcp, old.partly

    def _join_charset(self, old, new):
        """Its own: either side may offer it, and it may be said but once on a link."""
        sides = [side for side in (WILL, DO) if new.settled(side, CHARSET)]
        asked = {(DO, CHARSET), (WILL, CHARSET)} & set(new.world)
        if CHARSET in self.had and not asked and not sides:
            new.codec, new.charset = old.codec, old.charset     # nobody has asked it: as it was
            return b""
        begin = b""
        if sides and CHARSET not in self.had and not old.accepted:
            begin = b"".join(self._tell_link((side, CHARSET), old) for side in sides)
        if (old.codec or "iso8859-1") == (new.codec or "iso8859-1"):
            return begin
        accepts = sides and new.charset and new.charset[3] == CHARSET_ACCEPTED
        return begin + (new.charset if accepts else
                        CHARSET_UNKNOWN if CHARSET in self.had else b"")

    def go_on(self):
        self._await_answers()
        if self.waits:
            self.session.later(LATE_SECONDS, self.send_late)
        if self.replay and self.replay.early:
            self.session.later(OFFERS_SECONDS, self.replay.grow_old)


# The start of typed lines that HAS must read; everything else passes unread.
_WATCHED = re.compile(
    rb"[ \t]*(?:(?i:quit|logout|connect |@pa|@new|@na|output|pueblo)|SCREEN|SOCKSET|PROMPT_|#[?])")
_WATCHED_FIRST = b" \tqQlLcC@oOSpP#"            # where it can match at all
# ... unless it holds a byte that some server does not just keep (see LineReader): only its line
# end may be one. For translate(): it changes text that holds one, and is twice as fast as a
# regular expression.
_DOUBTS_MARKED = bytes(64 if n < 32 or n >= 127 else n for n in range(256))
_QUIT_LAST = re.compile(rb"(?i)(?:\A|[\r\n])\s*quit\s*[\r\n]\Z")


class Peek:
    """Off the fast path what comes is looked at first, and taken when it is written down: a line,
    or an answer at the login screen, that a process which dies has taken is not said again."""

    __slots__ = ("session", "_shown")

    def __init__(self, session):
        self.session, self._shown = session, None           # (stream, number of bytes)

    def update(self, state):
        """Whether that is so now: for the client, and for the link, if there is one."""
        session, inbox = self.session, self.session.inbox
        is_kept = session.hub.is_kept and not inbox.first.is_raw
        peeks = is_kept and not inbox.forward and state is not State.CLOSING
        if session.client.peek(peeks):
            session.client.on_data = self.on_client_data if peeks else inbox.on_data
        if session.link and session.link.peek(is_kept and state in AT_LOGIN):
            session.link.on_data = session.screen.reader

    def on_client_data(self, data):
        """The client sent `data`."""
        self._shown = self.session.client, len(data)
        self.session.inbox.catches_up = len(data) == LOOK_BYTES
        self.session.inbox.on_data(data)
        if self._shown:
            self.session.hub.keep(self.session)
            self.take()

    def take(self):
        """All that the client sent is written down."""
        shown, self._shown = self._shown, None
        if shown:
            stream, size = shown
            stream.take(size)

    def on_link_data(self, data):
        """The world sent `data`; what is written down of it is so by now."""
        link, screen = self.session.link, self.session.screen
        (screen.on_link_data if screen.spelling.coloured else screen.on_plain_data)(data)
        link.take(len(data))


class Inbox(Part):
    """What a client sends: read at once, in later turns, or once a link can take it."""

    SURVIVES = ("announced", "typed_at", "bytes_in", "quit_at", "first", "from_client", "typed",
                "kept", "kept_due", "backlog", "behind", "slow_until")
    __slots__ = SURVIVES + ("client", "forward", "peek", "catches_up")
    PASSING = ("typed_at", "bytes_in", "kept_due")

    def __init__(self, session, client):
        super().__init__(session)
        self.client = client
        self.forward = None        # the fast path: the link it leads to; see Screen.choose_path
        self.catches_up = False    # with what was typed while there was no process to read it
        self.typed_at, self.bytes_in = self.hub.now, 0
        self.announced = False     # the log has a line about him: who says nothing may be a probe
        self.quit_at = 0           # when his last line was QUIT; 0: it was another
        self.first = FirstLine()
        self.from_client = None        # splits what he sends, once a command was in it
        self.typed = LineReader()
        self.kept = b""            # sent while no link could take it
        self.kept_due = 0          # when the next line of that may go, if the world says nothing
        self.backlog = b""         # left for later turns
        self.behind = b""          # what comes behind that which is being read
        self.slow_until = 0        # nothing is read before: he tries many passwords
        self.peek = Peek(session)

    @property
    def is_fast(self):
        """Whether nothing that was typed before is in the way."""
        return not (self.kept or self.backlog or self.quit_at or not self.typed.idle
                    or self.catches_up and self.hub.is_kept
                    or self.from_client and self.from_client.held)

    def note_quit(self, quits):
        """His last line was QUIT, or another one."""
        if quits or self.quit_at:
            self.quit_at = self.hub.now if quits else 0
            self.session.refresh()              # another process may see the end of the link

    def has_quit(self, lately=0):
        """Whether the last line he typed was QUIT, within QUIT_SECONDS (and `lately` more)."""
        return self.quit_at and self.hub.now - self.quit_at < QUIT_SECONDS + lately

    # ---- in turn

    def on_data(self, data):
        """The client sent `data`: the fast path first."""
        self.typed_at = self.hub.now
        self.bytes_in += len(data)
        forward = self.forward
        if forward and data[-1] == 10 and (
                data[0] not in _WATCHED_FIRST or not _WATCHED.match(data)):
            line = data[:-2] if data[-2:-1] == b"\r" else data[:-1]
            if line.translate(_DOUBTS_MARKED) == line:
                forward.send(data)
                return
        if len(data) == LOOK_BYTES and not self.client.peeks:
            data += self.client.rest_of_line()
        if self.first.is_http is None:
            self._read_first_line(data)
        if self.first.is_raw:
            self._pass_raw(data)
        elif self.backlog or self.slow_until > self.hub.now:
            self.backlog += self._without_answers(data) if self.session.place.claim else data
            if len(self.backlog) > KEEP_BYTES:
                self.client.pause()
        else:
            self._read_in_turn(data)

    def _without_answers(self, data):
        """A login waits for a place; what his client says of options is not to wait with it."""
        session, rest = self.session, []
        self.from_client = self.from_client or Scanner(strict=True)
        for is_command, piece in self.from_client.feed(data):
            if is_command and len(piece) > 2:
                answer = session.telnet.on_client_command(piece)
                if answer and session.link:
                    session.link.send(answer)
            else:
                rest.append(piece)
        return b"".join(rest)

    def _read_in_turn(self, data):
        """Read what this turn of the hub still has time for; the rest in later turns."""
        session, hub = self.session, self.hub
        if data and not self.announced and self.bytes_in == len(data):
            session.announce()
            hub.door.look_at_first_words(session.host, data)
        # a line end or a telnet command costs about the same, a byte nearly nothing
        stop = end_of_nth(b"\r\n\xff", data, hub.patience)
        if session.state in AT_LOGIN:           # what comes behind a login that may have to wait
            stop = min(stop, end_of_nth(b"\r\n", data, max(1, hub.logins.left(session.host))))
        data, self.backlog = data[:stop], data[stop:]
        if self.backlog or stop >= LOOK_BYTES:              # there may be more
            self.client.pause()
            self.queue()
        if self.backlog:
            session.refresh()
        hub.patience -= 1 + len(data) - len(data.translate(None, b"\r\n\xff")) + len(data) // 1024
        if not data or session.state is State.CLOSING:
            return
        if session.state in AWAY or session.can_forward:
            self.read(data)
        else:
            self.keep(data)

    def queue(self):
        """Ask the hub for another turn."""
        if self.session not in self.hub.backlogs:
            self.hub.backlogs.append(self.session)

    def take_turn(self):
        """Go on with what was left for later turns."""
        if self.slow_until > self.hub.now:
            self.hub.later(self.slow_until - self.hub.now, self.queue)
            return
        data, self.backlog = self.backlog, b""
        if not self.client.closed:
            self.resume()
            self._read_in_turn(data)

    def resume(self):
        """Read the client again, unless something still forbids it: the only gate."""
        link = self.session.link
        if not (self.backlog or link and link.full or len(self.kept) > KEEP_BYTES
                or self.client.full or self.slow_until > self.hub.now):
            self.client.resume()

    def slow_down(self, seconds):
        """Read nothing for so long."""
        self.slow_until = self.hub.now + seconds
        self.client.pause()

    def go_on(self):
        self.kept, self.behind = self.behind + self.kept, b""
        if self.backlog or len(self.kept) > KEEP_BYTES or self.slow_until > self.hub.now:
            self.client.pause()
            self.queue()
            self.hub.later(max(0.0, self.slow_until - self.hub.now), self.resume)
        if self.kept and self.session.can_talk:
            self.session.later(NEXT_LINE_SECONDS, self.send_kept)

    def read_last(self):
        """His line has dropped: what he typed last is still carried out, or kept for when his
        return is over; half a line is not. Returns how often the world will answer an eraser."""
        session = self.session
        if session.state in AWAY or session.can_talk:
            self.read(self.release() + self.backlog)
        else:
            whole = self.kept + self.backlog
            self.kept = whole[:whole.rfind(b"\n") + 1]
        erased = 0
        if self.typed.sent and session.can_talk:
            erased = len(self.typed.buffer + self.typed.unfinished)
            session.link.send(session.dialect.erasers[:1] * erased)
        self.backlog, self.behind, self.from_client, self.slow_until = b"", b"", None, 0
        self.typed.clear()
        return erased

    def take_rest(self):
        """What he has typed that was not read yet."""
        self.end_claim()
        rest = self.behind + self.kept + self.backlog
        self.kept = self.backlog = self.behind = b""
        return rest

    def end_claim(self):
        """Nothing that he sends waits for a place any more."""
        self.slow_until = 0
        if self.from_client and self.from_client.held:          # it came behind all that waits
            self.backlog += self.from_client.held
            self.from_client = Scanner(strict=True)

    def finish(self):
        """He sends no more: what he typed last is still carried out and answered."""
        session = self.session
        session.note_client_gone()
        self.read(self.release())
        session.link.finish()
        session.enter(State.CLOSING)
        session.later(FLUSH_SECONDS, session.end)

    # ---- clients that speak HTTP

    def _read_first_line(self, data):
        """A client that speaks HTTP, or the frames of a websocket, can be told nothing."""
        session = self.session
        self.first.feed(data, session.dialect.serves_http and not session.lines.has_secret_word)
        if not self.first.is_http:
            self.first = self.first if self.first.is_http is None else TYPED_LINE
            return
        session.announce()
        log.info("%s: speaks HTTP (a websocket?): it is told nothing, and ends with its world",
                 session)
        self.peek.update(session.state)
        if session.link:
            session.link.on_data = session.screen.reader
        if session.state in AWAY:
            session.end_with_world()
        elif self.first.is_raw and not _PAGE_REQUEST.match(data):
            self._count_websocket()

    def _count_websocket(self):
        """Nobody can read the logins in its frames: the connection counts as one. It cannot wait,
        for the server takes such a request at once or not at all."""
        session = self.session
        wait = self.hub.logins.wait(session, b"")
        if wait:
            session.client.send(TOO_MANY % math.ceil(wait))
            session.close("too many websockets and logins of its address")

    def _pass_raw(self, data):
        """Bytes of such a client, for the world as they are."""
        if self.session.state is State.CLOSING:
            return
        if self.session.can_forward:
            self.session.link.send(data)
            return
        self.kept += data
        if len(self.kept) > KEEP_BYTES:
            self.client.pause()

    # ---- what no link can take yet

    def keep(self, data):
        """Keep what was sent until it can be read."""
        session = self.session
        if session.state is State.OPENING:
            session.hold.tell_silence()
        self.kept += data
        if IAC in data:
            self._answer_kept()
        if session.hold.silent and session.state is State.OPENING and _QUIT_LAST.search(self.kept):
            session.close("quit")               # he need not wait for the link to open
            return
        if len(self.kept) > KEEP_BYTES:
            self.client.pause()                 # nothing is lost: the rest waits at the client
        session.refresh()

    def _answer_kept(self):
        """Answer what asks for an answer at once: telnet(1) shows nothing until then (Ctrl-C)."""
        kept = []
        for is_command, piece in split_commands(self.kept):
            if is_command and piece in ASKS_FOR_LIFE:
                self.session.telnet.answer_for_world(piece)
            else:
                kept.append(piece)
        self.kept = b"".join(kept)

    def release(self):
        """Take what was kept."""
        kept, self.kept = self.kept, b""
        self.resume()
        if kept:
            self.session.refresh()
        return kept

    def read_kept(self):
        """Read what was kept, in turn; it was typed before what was left for later turns."""
        if self.first.is_raw:
            self._pass_raw(self.release())
            return
        data, self.backlog = self.release() + self.backlog, b""
        if self.session.place.claim:            # it was typed behind a login that waits
            self.backlog = data
        else:
            self._read_in_turn(data)

    def send_kept(self):
        """Send one line typed during a return; the next follows the world's answer, or a while
        (rule 4): TeenyMUSH runs lines that arrive together last first."""
        session = self.session
        if session.state is State.LOGIN:
            self.read_kept()
            return
        kept = self.release()
        end = session.dialect.line_end.search(kept)
        stop = end.end() if end else len(kept)
        self.behind = kept[stop:]
        self.read(kept[:stop])
        rest, self.behind = self.behind, b""
        if rest and session.state in AT_LOGIN | LINKED:
            self.keep(rest)
            self.kept_due = self.hub.now + NEXT_LINE_SECONDS
            session.later(NEXT_LINE_SECONDS, self.send_more)

    def send_more(self):
        """It is time for the next line, unless one went meanwhile."""
        if self.kept and self.hub.now >= self.kept_due and self.session.can_talk:
            self.send_kept()

    # ---- the careful way: telnet, then lines

    def read(self, data):
        """Read what was sent, as the world will; what it gets is sent."""
        if data:
            self.session.screen.in_one_piece(self._read, data)

    def _read(self, data):
        session = self.session
        if session.dialect.cr_first and (self.from_client and self.from_client.held or IAC in data):
            data = data.replace(b"\r", b"")
        if self.from_client is None and IAC in data:
            self.from_client = Scanner(strict=True)
        pieces = iter(self.from_client.feed(data) if self.from_client else [(False, data)])
        out = b"".join(self._read_piece(is_command, piece, pieces) for is_command, piece in pieces)
        session.refresh()
        if out and session.link:
            self.hub.keep(session)              # before: what was sent is not sent again
            self.peek.take()
            session.link.send(out)

    def _read_piece(self, is_command, piece, others):
        """One piece, before the `others`; returns what the world gets of it now."""
        session = self.session
        if is_command:
            text = session.dialect.as_text(piece) if len(piece) == 2 else None
            return (session.telnet.on_client_command(piece) if text is None
                    else self._read_text(text))
        if is_command is None:                  # of a sub-negotiation that is too long to look at
            return piece if session.can_forward and session.dialect.telnet else b""
        out = self._read_text(piece)
        if session.lines.braked:
            self._put_back(others)
        return out

    def _put_back(self, pieces):
        """A login waits: so does what was typed behind it. The scanner begins anew there."""
        held = self.from_client.held if self.from_client else b""
        rest, self.behind = self.behind + b"".join(piece for _, piece in pieces) + held, b""
        if self.from_client:
            self.from_client = Scanner(strict=True)
        self.backlog = rest + self.backlog
        self.queue()

    def _read_text(self, text):
        """Split typed text; returns what goes on to the world."""
        session, out = self.session, []
        lines, away = session.lines, session.state in AWAY
        if not away:
            session.hold.tell_silence()
        for raw, line in self.typed.lines(session.dialect, text):
            if away and line is not None:
                lines.answer_while_away(line)
            elif not away:
                out.append(lines.take_part(raw) if line is None else lines.take(line, raw))
            if lines.braked:                    # LOGOUT and many logins may come in one read
                self.behind = self.typed.break_off()
                break
        return b"".join(out)


# What clients send by timer, to stay connected: an empty line, IDLE, @@ (worlds/pennmush.md b).
_BY_TIMER = re.compile(rb"(?is)[\s\x00]*(?:(?:idle|@@)(?:\s.*|@.*)?)?\Z")


def put_around(before, lines):
    """What a world puts around its answers to `lines`, which make settings, where those of `before`
    are in force: the prefix as it was, the suffix as it is behind the line."""
    answers, settings = [], dict(before)
    for word, value in lines:
        answers.append(settings.get(b"OUTPUTPREFIX"))
        settings[word] = value
        answers.append(settings.get(b"OUTPUTSUFFIX"))
    return [line + b"\r\n" for line in answers if line]


class Lines(Part):
    """What each line means that a user types: to HAS, and for the world (rules 3, 5, 7, 8, 9)."""

    __slots__ = SURVIVES = ("settings", "braked", "iced", "unsent")

    def __init__(self, session):
        super().__init__(session)
        self.settings = NOTHING    # what the user set for his connection: word -> value
        self.braked = None         # (login, its bytes): waits, for too many were tried
        self.iced = b""            # lines passed on since the world has fallen silent
        self.unsent = 0            # lines of this second that were answered as unsent

    # ---- while a world is there

    def take_part(self, raw):
        """The beginning of a line; returns what the world gets of it now."""
        if self._spells_out():
            return b""
        self.session.inbox.typed.sent = True
        return raw

    def take(self, line, raw):
        """A whole line, and its bytes; returns what the world gets of it now."""
        session, typed = self.session, self.session.inbox.typed
        dialect, spells_out = session.dialect, self._spells_out()
        if spells_out or not typed.sent and (
                typed.doubt or dialect.in_doubt(typed.buffer, typed.charset)):
            raw = unspelled(line) + (b"\r\n" if raw.endswith(b"\r\n") else raw[-1:])
        if spells_out and session.state is State.LOGIN:     # LOGOUT may have come just before it
            return self._take_at_login(line, raw)
        if session.state is not State.LOGIN and self._asks_for_list(line):
            return raw if typed.sent else b""
        login = self._logs_in_unseen(line)
        return self._take_unseen(login, raw) if login else self._pass_on(line, raw)

    def _logs_in_unseen(self, line):
        """The Credentials of a login typed in the game: softcode may have logged him out
        (`@force me=LOGOUT`), and then it counts. Where marks can tell."""
        session = self.session
        may_be = (session.state is State.PLAYING and session.dialect.mark_behind
                  and not session.inbox.typed.sent and line.lstrip()[:8].lower() == b"connect ")
        return session.dialect.read_login(line) if may_be else None

    def _take_unseen(self, login, raw):
        proof = self.session.feed.proof
        self.session.later(MARK_SECONDS, proof.retire)
        return self._take_login(login, raw, may_claim=False)

    def _spells_out(self):
        """Whether the world gets finished lines only, as HAS has read them: it reads the same."""
        session = self.session
        return session.dialect.capped or session.state is State.LOGIN and (
            session.dialect.logs_in or self.has_secret_word)

    def _pass_on(self, line, raw):
        self.note(line)
        if self.session.state is State.LOGIN and self._is_for_the_game(line):
            self.session.feed.proof.type_behind(line)
        self._note_iced(raw)
        return raw

    def _note_iced(self, raw):
        """A line passed on to a silent world may never be carried out; who quits need not wait."""
        if not self.session.hold.silent:
            return
        if self.session.inbox.quit_at:
            self.hub.later(0, self.session.close, "quit")       # after this line has gone on
        self.iced = (self.iced + raw)[-KEEP_BYTES:]

    def take_iced(self):
        """The lines that a world which is now given up has not carried out."""
        iced, self.iced = self.iced, b""
        return iced

    def _asks_for_list(self, line):
        """Answer an admin's #?; False if it is nothing of the kind."""
        proven = self.session.character.proven.decode("utf-8", "replace")
        if line != b"#?" or proven not in self.hub.settings.admins:
            return False
        heading = self.hub.settings.list_heading_notice
        self.hub.control.collect(session_line, lambda status, lines: self.session.screen.answer(
            "\n".join(status_lines(status) + listed(lines, heading))))
        return True

    # ---- what the world will read of somebody who is logged in, or about to be

    def _in_game(self, line):
        """A line as commands of the game are compared with it."""
        return line.lstrip(b" \t") if self.session.dialect.strips_blanks else line

    def _is_for_the_game(self, line):
        """Whether a line means something that HAS must know, if it is read in the game."""
        dialect, line = self.session.dialect, self._in_game(line)
        return any(rule.match(line) for rule in (
            dialect.quit_playing, dialect.logout, dialect.password_typed, dialect.password_given,
            dialect.name_typed))

    def note(self, line):
        """Remember what a line means that goes on to the world."""
        session, dialect = self.session, self.session.dialect
        playing = session.state is State.PLAYING
        if playing:
            line = self._in_game(line)
        quits = (dialect.quit_playing if playing else dialect.quit_login).match(line)
        session.inbox.note_quit(quits)
        setting = (dialect.setting_playing if playing else dialect.setting_words).match(line)
        if setting:
            self._note_setting(setting.group(1).upper(), setting.group(2) or b"")
        if playing and dialect.logout.match(line):
            self.settings = NOTHING
            session.handle(Event.LOGOUT)
        elif playing:
            self._note_change(line)

    def _note_change(self, line):
        """A new password or a new name."""
        session, dialect = self.session, self.session.dialect
        character, now = session.character, self.hub.now
        password, name = dialect.password_typed.match(line), dialect.name_typed.match(line)
        given = dialect.password_given.match(line)
        own = (b"me", character.login.character if character.login else b"me")
        if given and given.group(1).lower() in own:
            character.may_have(given.group(2))
        elif password:
            character.change("password", password.group(1), now)
        elif name and re.search(rb"[\[%\\{]", name.group(2)):
            session.note("used softcode in @name",
                         "uses softcode in @name; a new name that comes of it is not known to HAS")
        elif name and name.group(1).lower() in own:
            character.change("name", name.group(2), now)

    def _note_setting(self, word, value):
        """Remember a setting for the next link; SOCKSET holds several, told apart by name."""
        if word == b"SOCKSET":
            if b"=" not in value:
                return                          # asks for a list of them
            word += b" " + value.partition(b"=")[0].strip().upper()
        if len(value) <= 500 and (word in self.settings or len(self.settings) < 40):
            self.settings = {**self.settings, word: value}
        if word == b"PUEBLOCLIENT":
            # whatever becomes of the setting: his client reads tags from now on
            screen = self.session.screen
            screen.spelling = Spelling(screen.spelling.coloured, True)

    @staticmethod
    def _setting_line(word, value):
        return word.split()[0] + (b" " + unspelled(value) if value else b"") + b"\r\n"

    def setting_lines(self, held):
        """The lines that repeat his settings: whose answers can be `held` back, or the others."""
        is_held = self.session.dialect.settings_held
        return b"".join(
            self._setting_line(word, value) for word, value in self._in_order()
            if held == (is_held and not word.startswith(b"OUTPUT")))

    def _in_order(self):
        """The settings; the prefix and the suffix come last: they would stand around the answers to
        the others."""
        return sorted(self.settings.items(), key=lambda it: (it[0].startswith(b"OUTPUT"), it))

    def setting_answers(self):
        """What the world puts around the answers to those lines that are not held back."""
        return self._around({}, [it for it in self._in_order() if it[0].startswith(b"OUTPUT")])

    def _around(self, before, lines):
        return put_around(before, lines) if self.session.dialect.wraps_settings else []

    # ---- at the login screen

    def _handover_words(self):
        """How addresses are handed over, by the settings in use and those to come (HUP)."""
        hub = self.hub
        return {hub.settings.remotehostname_cmd} | ({hub.world.word} if hub.world else set())

    @property
    def has_secret_word(self):
        """Whether the admin has chosen a word for that."""
        return not self._handover_words() <= {"auto", "none"}

    def _is_handover(self, line):
        return any(self.session.dialect.is_handover(line, word) for word in self._handover_words())

    def _take_at_login(self, line, raw):
        session, dialect = self.session, self.session.dialect
        if len(session.inbox.typed.buffer) > dialect.longest_login:
            session.screen.answer(self.hub.settings.too_long_notice)
            return b""
        if self._is_handover(line):
            what = "typed the word that hands over addresses"
            line = f"{session}: {what}; the line was not passed on"
            self.hub.door.quiet.note(session.host, what, line, level=logging.WARNING)
            return b""
        if dialect.harms(line):
            session.screen.answer(self.hub.settings.unreadable_notice)
            return b""
        login = dialect.read_login(line)
        if login:
            self._note_iced(raw)
            return self._take_login(login, raw)
        session.feed.proof.no_login(line)
        return self._pass_on(line, raw)

    def _take_login(self, login, raw, may_claim=True):
        """Returns what the world gets of a login line now (see Proof.wrap): nothing, if it opens a
        place, or if too many were tried from this address. Then it waits, and all that is typed
        behind it."""
        session = self.session
        session.inbox.note_quit(False)
        if may_claim and self._claims(login, raw):
            return b""
        wait = self.hub.logins.wait(session, login.character)
        if wait:
            self.braked = login, raw
            session.screen.answer(filled(self.hub.settings.login_brake_notice,
                                         seconds=math.ceil(wait)))
            session.inbox.slow_down(wait)
            self.hub.later(wait, self.try_login)
            return b""
        session.character.type(login, self.hub.now, bool(session.feed.spoke_at))
        self.hub.links.suspects.came(login.character, self.hub.now, typed=True)
        return session.feed.proof.wrap(login, raw, self.settings)

    def _claims(self, login, raw):
        """Whether a login is right for a place that is kept (see Claim). Not even that is looked at
        while the brake holds: nobody can try passwords by it."""
        session = self.session
        if not (self.hub.settings.reattach and self.hub.logins.may_go(session.host)
                and session.place.claims(login)):
            return False
        self.braked = login, raw
        session.inbox.slow_until = self.hub.now + CLAIM_SECONDS
        return True

    def claim_kept(self, login, raw):
        """Whether a login that no world has read opens a place; if not, that was a try."""
        if not self.hub.settings.reattach:
            return False
        claims = self._claims(login, raw)
        if not claims:
            self.hub.logins.wait(self.session, login.character)
        return claims

    def try_login(self):
        """The login that waits for the brake may go on now."""
        if not self.session.place.claim:
            self._go_on_with(self._take_login, self._take_login_while_away)

    def pass_login(self):
        """The login that waits opens no place: it goes on like any other."""
        self._go_on_with(lambda *braked: self._take_login(*braked, may_claim=False),
                         self._keep_login)

    def _go_on_with(self, take, take_while_away):
        session, inbox = self.session, self.session.inbox
        braked, self.braked = self.braked, None
        if not braked:
            return
        inbox.end_claim()
        if session.state in LINKED:
            login = take(*braked)
            self.hub.keep(session)              # before: its mark must be known when it comes
            session.link.send(login)
        elif session.state in AWAY:
            take_while_away(*braked)
        elif session.state is State.OPENING:
            inbox.kept = braked[1] + inbox.kept
        inbox.queue()
        inbox.resume()
        session.refresh()

    def go_on(self):
        """In a new process: a count is told, and the login that waits goes on, when its time has
        come, unless it opens a place: that is to be seen when all are there."""
        if self.unsent:
            self.session.later_anyway(1, self.tell_unsent)
        if self.braked:
            self.hub.later(0, self._claim_again)

    def _claim_again(self):
        if self.braked and not self._claims(*self.braked):
            wait = self.session.inbox.slow_until - self.hub.now
            self.hub.later(max(0.0, wait), self.try_login)

    def drop_braked(self):
        """The world has gone: the login that waits, or None, need not wait any more."""
        if self.session.place.claim:
            return None                         # it goes on, see Claim
        braked, self.braked = self.braked, None
        self.session.inbox.slow_until = 0
        return braked and braked[0]

    # ---- while the world is away

    def answer_while_away(self, line):
        """Answer a line typed while no world reads it: nothing vanishes silently (rule 3)."""
        session, dialect = self.session, self.session.dialect
        login = dialect.read_login(line) if len(line) <= dialect.longest_login else None
        if login and not (login.password or login.is_guest):
            login = None                        # it would be refused: he may correct it
        if re.match(rb"(?i)\s*quit\s*\Z", line):
            session.close("quit while the world is down")
        elif self._asks_for_list(line) or _BY_TIMER.match(line):
            pass
        elif login or self._is_handover(line):
            self._take_login_while_away(login, line + b"\r\n")
        else:
            self._answer_unsent(line)

    def _take_login_while_away(self, login, raw):
        """`login`: None for what only looks like one. A try at a kept place counts as any other."""
        if not (login and self.claim_kept(login, raw)):
            self._keep_login(login, raw)

    def _keep_login(self, login, _):
        """For the world's return."""
        if login:
            self.session.character.type_while_away(login)
        self.session.screen.answer(self.hub.settings.login_kept_notice)

    def join(self, others):
        """Another client is at this link, which has made the settings of `others` (Lines) where it
        stood until now: the link gets those, and forgets a prefix it knows nothing of."""
        before, theirs = self.settings, others.settings
        dropped = [word for word in before if word.startswith(b"OUTPUT") and word not in theirs]
        kept = {word: value for word, value in before.items() if word not in dropped}
        changed = {word: value for word, value in theirs.items()
                   if word != b"PUEBLOCLIENT" and value != before.get(word)}
        self.settings = {**kept, **theirs}
        if self.session.can_talk:
            lines = list({**dict.fromkeys(dropped, b""), **changed}.items())
            self.session.link.send(b"".join(itertools.starmap(self._setting_line, lines)))
            self.session.screen.expect(self._around(before, lines))

    def _answer_unsent(self, line):
        if not self.unsent:
            self.session.later_anyway(1, self.tell_unsent)      # of this second
        self.unsent += 1
        if self.unsent <= UNSENT_LINES:
            plain = re.sub(rb"[\x00-\x1f\x7f]", b"?", line[:500])
            self.session.screen.answer(self.hub.settings.unsent_notice, b" " + plain)

    def tell_unsent(self):
        """How many more than were answered one by one; once a second, and before his return."""
        more, self.unsent = self.unsent - UNSENT_LINES, 0
        session, settings = self.session, self.hub.settings
        if more > 0 and session.state in AWAY:
            notice, more = settings.unsent_notice, filled(settings.unsent_more_notice, lines=more)
            session.screen.answer(notice and f"{notice} {more}")


class Return(Part):
    """A user's way back into the world (rule 4): from the notice that it is up to the game, the
    login screen, or another wait."""

    SURVIVES = ("greeting", "words", "words_due")
    __slots__ = SURVIVES + ("character", "settled", "said")

    def __init__(self, session):
        super().__init__(session)
        self.character = session.character
        self.greeting = None       # the notice for the next login screen
        self.words = b""           # the world's last words to a return that failed
        self.words_due = False     # ... are still to be shown, if it lives on
        self.settled = False       # in, but others of this character are not yet
        self.said = b""            # ... what the world has said to his login

    def plan(self):
        """The world is up: queue for a link, to the game or to the login screen."""
        session, hub, character = self.session, self.hub, self.character
        self.greeting = self.greeting or (
            hub.settings.guest_notice if character.is_guest else hub.settings.online_notice)
        character.plan_return(session.dialect.logs_in)
        if session.who in hub.links.suspects.barred:
            self._give_up()
        elif hub.world.checks and character.must_be_checked(session.dialect.counts_failures):
            character.checked = list(character.trials)
            hub.check(session, character.checked)
        else:
            hub.links.add(session)

    def _give_up(self):
        """His coming back kills the world (see Suspects): he may log in by himself, if he can."""
        notice = self.hub.settings.suspect_notice
        why = "the world died each time he came back"
        self.hub.history.refused(self.session.number, why)
        if not self.character.trials:
            self.session.close(why, notice)
            return
        self.character.forget()
        self.greeting = notice
        self.hub.links.add(self.session)

    def on_checked(self, verdicts):
        """The heartbeat's answer about the pairs to try."""
        if self.character.is_asked_for_another:
            self.plan()
            return
        if not self.character.choose(verdicts, self.session.dialect.counts_failures):
            self.hub.links.settle(self.session)         # others of his need not wait for it
            self.forget_login()
        self.hub.links.add(self.session)

    def forget(self):
        """The world is down: what comes next is another return."""
        self.greeting, self.words, self.words_due = None, b"", False

    # ---- the link

    def begin(self):
        """A link is being opened."""
        self.session.lines.tell_unsent()
        self.settled = False
        if self.words_due and self.session.life == self.hub.world.life:
            self.session.screen.show(self.words)
        self.words_due = False

    def script(self, path):
        """What goes to the world on the new link, which leads to the Unix socket `path` or None."""
        session = self.session
        session.later(RETURN_SECONDS, session.handle, Event.OVERDUE)
        replay, login = session.telnet.replay, self.character.trials[0]
        script = session.feed.proof.script(login, session.lines.setting_lines(True))
        if path and replay and replay.had:
            replay.late = script                # goes with the telnet, at the first command
            return b"INFO\r\n"                  # which this brings at once
        return script

    def on_link_ended(self, reason):
        """The world ended the link. Full, disabled, forbidden: that is for the user, but only if
        the world lives on, not at each try, and never once the login took. Known when the next
        link opens."""
        proof = self.session.feed.proof
        words = b"" if proof.login else proof.words()
        if not proof.login and words != self.words:
            self.words, self.words_due = words, True
        if words:
            self.character.was_answered_in_words()
        self.session.opening.failed(reason)

    # ---- the outcome

    def on_end_marker(self):
        """All is known that there is to know of this login."""
        session, proof = self.session, self.session.feed.proof
        if not proof.login:
            self._refused()
        elif not self.settled and proof.settles and self.hub.links.siblings(session):
            # the others' login text comes here too: go on when the last is in
            self.settled, self.said = True, proof.words()
            session.arrived()
            self.hub.links.settle(session)
        else:
            proof.retire()                      # all its marks came before the end marker
            self._succeed()

    def settle(self):
        """The last of this character's is in: one more end marker, and what came is dropped."""
        session, proof = self.session, self.session.feed.proof
        returning = session.link and session.state is State.RETURNING
        if returning and self.settled and proof.ended:
            session.link.send(proof.ask_again())

    def on_marker_overdue(self):
        """The world has answered the login, not the question behind it (builds without telnet)."""
        if self.session.state is State.RETURNING and not self.session.feed.proof.ended:
            self.session.feed.proof.end()
            self.on_end_marker()

    def on_overdue(self):
        """Last resort: no end marker came, or others of this character take too long."""
        session, proof = self.session, self.session.feed.proof
        held = b"" if self.settled else proof.held
        proof.end()
        session.later(MARK_SECONDS, proof.retire)
        if not self.settled:
            log.warning("%s: no end of the login seen in %d s; showing what came", session,
                        RETURN_SECONDS)
        if proof.login:
            self._succeed(held)
        else:
            session.enter(State.LOGIN)
            session.arrived()
            session.opening.show_login_screen(held)

    def _succeed(self, held=b""):
        """The user is in the game again, and sees what was `held`."""
        session, screen, proof = self.session, self.session.screen, self.session.feed.proof
        first, lost_change = self.character.came_back(proof.login)
        self.hub.history.returned(session.number)
        session.place.login_took()
        session.opening.failures, self.greeting, session.hold.told = 0, None, False
        screen.write(self.hub.settings.online_notice)
        session.telnet.leave_off()
        if first:
            screen.show(self.said if self.settled else proof.words())   # only returns are silent
        self.said = b""
        session.link.send(session.lines.setting_lines(False))
        answers = session.lines.setting_answers()
        if answers:
            screen.expect(answers)
        session.arrived()
        session.enter(State.PLAYING)
        log.info("%s: is back in the game%s", session, " with the name and password of before the "
                 "last change of them, which the world has lost" if lost_change else "")
        screen.show(held)
        if session.inbox.kept:
            session.inbox.send_kept()

    def _refused(self):
        """The world took the line and not the login: the other pair, or the user must log in."""
        session, proof = self.session, self.session.feed.proof
        self.hub.links.settle(session)          # others of this character need not wait for it
        if len(self.character.trials) > 1:
            session.drop_link()                 # some worlds end a link after three wrong logins
            del self.character.trials[0]
            session.wait_again(State.WAITING)
            self.hub.links.add(session)
            return
        self.forget_login(not proof.refused)
        proof.returning = False                 # this link stands at the login screen, so does he
        session.enter(State.LOGIN)
        session.telnet.leave_off()
        session.arrived()
        session.opening.show_login_screen(proof.words())

    def forget_login(self, unexplained=False):
        """The world refused it. It is tried once more, in the world's next life, where the refusal
        says little: of a login that took before, in words HAS does not know, or while the
        heartbeat is refused as well."""
        character = self.character
        tried = character.login or character.pending
        again = self.hub.world.shut or unexplained and character.login
        log.warning("%s: the world refused the login of %s on return; the user must log in%s",
                    self.session, printable(tried.name) if tried else "this user",
                    ", and the login is kept for the world's next life" if again else " again")
        character.forget(tried if again else None)
        self.hub.history.refused(self.session.number, "the world refused the login")
        self.greeting = self.hub.settings.relogin_failed_notice


class Hold(Part):
    """How long a user waits for a world that is away or silent, and what he is told of it."""

    __slots__ = SURVIVES = ("silent", "told", "told_at", "held_since")

    def __init__(self, session):
        super().__init__(session)
        self.silent = False        # the world does not answer
        self.told = False          # ... or is away, and he knows
        self.told_at = 0           # when he was last told how long it has lasted
        self.held_since = 0

    def begin(self, notice):
        """The world is down: keep this client, tell him, and take up what he has typed."""
        session, hub = self.session, self.hub
        if session.inbox.first.is_http:
            session.end_with_world()
            return
        braked = session.lines.drop_braked()
        session.character.keep_unanswered(hub.now, session.feed.spoke_at, braked)
        session.screen.show_hidden()
        session.give_up_link()
        session.serial += 1
        session.opening.failures = 0
        session.way_back.forget()
        session.inbox.typed.sent = False        # a line begun for the dead world is for the next
        self.silent, self.told = False, True
        session.enter(State.WAITING)
        session.screen.flush()
        session.telnet.end_echo()
        session.screen.write(notice)
        self.told_at = self.held_since = hub.now
        hub.later(1, self.look, self.held_since)            # first of all others are to be told
        session.inbox.read(session.lines.take_iced() + session.inbox.release())

    def look(self, since):
        """Close the client if it was held long enough; else look later: HUP may change that."""
        session, hub = self.session, self.hub
        if session.client.closed or self.held_since != since or (
                session.state not in AWAY | COMING_BACK):
            return
        character, settings = session.character, hub.settings
        hold = settings.hold if character.login or character.pending else settings.login_hold
        left = since + hold - hub.now if hold else 60
        if left > 0:
            hub.later(min(60, left, self._tell_how_long()), self.look, since)
        elif session.state in COMING_BACK or hub.is_up:
            hub.later(1, self.look, since)      # his return is under way, or soon will be
        else:
            session.close("held long enough", settings.hold_over_notice)

    def _tell_how_long(self):
        """Once a while: he has heard nothing since the notice that the world is down. Returns the
        seconds until it is time to look again."""
        hub, settings = self.hub, self.hub.settings
        if hub.is_up or not settings.still_offline_every:
            return 60
        if hub.now - self.told_at >= settings.still_offline_every:
            self.told_at = hub.now
            self.session.refresh()
            notice = filled(settings.still_offline_notice,
                            time=ago(time.time() - hub.record.health_since))
            self.session.screen.answer(hub.control.with_maintenance(notice))
        return max(1, self.told_at + settings.still_offline_every - hub.now)

    # ---- silence

    def on_silence(self, silent):
        """The world has stopped answering, or answers again."""
        session, settings = self.session, self.hub.settings
        if silent is not self.silent:           # else a new process is told what it knows
            self.silent, session.lines.iced = silent, b""
        if silent and session.linked:
            session.telnet.answer_asked(ASKS_FOR_LIFE)
        if silent and session.inbox.has_quit(settings.hb_timeout + settings.beat):
            session.close("quit")
        if not silent and session.state in AT_LOGIN | {State.PLAYING, State.ASKING}:
            self.told = False
        if session.state in (State.ASKING, State.OPENING) or (
                session.state is State.LOGIN
                and (not session.feed.spoke_at or session.character.unanswered)) or (
                session.state is State.PLAYING
                and session.inbox.typed_at > self.hub.health.answered_at):
            self.tell_silence()                 # he sees nothing, and may type nothing any more
        session.refresh()

    def tell_silence(self):
        """Tell him once that the world does not answer."""
        if self.silent and not self.told:
            self.told = True
            self.session.screen.notify(self.hub.settings.silent_notice)

    def tell_failure(self):
        """Tell him once that the world takes no link."""
        if not self.told:
            self.told = True
            self.session.way_back.greeting = self.hub.settings.online_notice
            self.session.screen.write(self.hub.offline_notice)


class Feed(Part):
    """Everything the world sends on a link: telnet, marks, outcomes of logins, arrivals."""

    SURVIVES = ("proof", "spoke_at")
    __slots__ = SURVIVES + ("character", "screen")
    PASSING = "spoke_at",

    def __init__(self, session):
        super().__init__(session)
        self.character, self.screen = session.character, session.screen
        self.proof = None          # what proves a login on this link; None: there was no link yet
        self.spoke_at = 0          # when the world last spoke at the login screen of this link

    def new_link(self, returning):
        """Nothing was said on this link yet."""
        world = self.hub.world
        self.proof, self.spoke_at = proof_for(world.dialect, returning, world.telnet), 0
        self.character.give_up_change()
        self.screen.hidden, self.screen.expected = b"", []

    def read(self, data):
        """The careful way to take what the world sent."""
        session, before = self.session, self.session.state
        self.hub.burden += 10
        self.screen.in_one_piece(self._read_pieces, data)
        if before in (State.LOGIN, State.RETURNING):            # it may be in the game by now
            self.hub.links.spoke(session)
        if session.state is State.RETURNING and session.link:
            acknowledge(session.link.wire)
        if session.inbox.kept and before is session.state is State.PLAYING:
            session.inbox.send_kept()           # the world has answered the one before
        self.screen.shorten()
        if self.character.changing and self.hub.now > self.character.changing.until:
            self.character.give_up_change()
        session.note_changes(before)

    def _read_pieces(self, data):
        telnet, screen = self.session.telnet, self.screen
        for is_command, piece in telnet.split(data):
            if is_command and self.proof.saw_command(piece):
                self.session.handle(Event.MARKED)
            elif is_command:
                screen.send(telnet.on_world_command(piece))
            elif is_command is None:
                screen.send(piece)
            else:
                screen.show(self._read_text(piece))

    def _read_text(self, text):
        """Text of the world; returns what the client gets of it."""
        session, character = self.session, self.character
        if self.proof.live:
            text = self._read_marks(text)
        if session.state is State.RETURNING:
            return b""                          # settled: what the others of this character cause
        if character.changing:
            for change, before in character.follow_change(session.dialect, text):
                self.hub.places.changed(session, change, before)
                session.note(f"changed the {change.kind}")
        elif session.state is State.LOGIN:
            self._look_for_refusals(text)
        return self.screen.without_hidden(text)

    def _read_marks(self, text):
        """Look for what proves a login, or its end; returns the rest."""
        session = self.session
        text, news = self.proof.hear(text)
        if News.TOOK in news and session.state in LINKED:
            session.handle(Event.TOOK)
        if News.ASK in news and session.link:
            session.link.send(self.proof.question())
            session.later(END_SECONDS, session.way_back.on_marker_overdue)
        if News.ENDED in news and session.state is State.RETURNING:
            session.handle(Event.MARKED)
        return text

    def _look_for_refusals(self, text):
        """Text at the login screen: a login that was refused is not sent again."""
        if text.strip():
            self.spoke_at = self.hub.now
        tail, dialect = self.screen.tail, self.session.dialect  # a text may come in two pieces
        refusals, others = (
            sum(it.end() > len(tail) for it in pattern.finditer(tail + text))
            for pattern in (dialect.refused_text, dialect.not_taken_text))
        if self.character.unanswered and refusals + others:
            self.session.note("were refused a login", "the world refused a login")
        self.character.answered(refusals, others, final=not self.hub.world.shut)

    # ---- typed logins

    def on_login(self):
        """A typed login took."""
        session, proof = self.session, self.proof
        pairs = self.character.took(proof.login, proof.others, proof.is_whole)
        if proof.is_first:
            self.hub.logins.took(session)
        session.place.login_took(proof.is_first)
        session.enter(State.PLAYING)
        session.note("logged in", free=300)
        if proof.is_whole:
            session.later(MARK_SECONDS, self._retire, proof.login)
        elif self.hub.world.checks:
            self.character.checked = pairs[0]
            self.hub.check(session, pairs)
        self._read_behind()

    def _read_behind(self):
        """What he has typed behind the login before that was known to have taken."""
        line = b""
        while line is not None and self.session.state is State.PLAYING:
            line = self.proof.next_behind()
            if line is not None:
                self.session.lines.note(line)

    def _retire(self, login):
        if self.proof.login is login:           # else marks of others may come
            self.proof.retire()
            self.screen.choose_path()
        return False                            # another process waits for them anew

    def on_logout(self):
        """The world has read his LOGOUT."""
        self.session.note("logged out to the login screen", free=300)
        self.character.log_out()
        self.proof.log_out()
        self.session.enter(State.LOGIN)

    def on_checked(self, verdicts):
        """The heartbeat's second proof: of each pair True, False or None (unknown)."""
        if self.character.confirm(verdicts, self.proof.others):
            self.session.note("were let in with a denied password", "the world logged it in but "
                              "denies the password; it cannot be brought back")
            self.character.forget()

    def go_on(self):
        session, checked = self.session, self.character.checked
        if session.state is not State.PLAYING or not self.proof:
            return
        if checked:                             # the heartbeat of before took the question along
            self.hub.check(session, [checked, *self.proof.others])
        session.later(MARK_SECONDS, self.proof.retire)


class Opening(Part):
    """The opening of links, one after another, to the login screen or for a return."""

    __slots__ = SURVIVES = ("failures", "failing_since")

    def __init__(self, session):
        super().__init__(session)
        self.failures = self.failing_since = 0          # tries, one after another

    def connect(self):
        """It is this session's turn."""
        session, world = self.session, self.hub.world
        returning = session.state in AWAY and bool(session.character.trials)
        if not self.failures:
            self.failing_since = self.hub.now
        session.way_back.begin()                # it looks at the life of the last link
        session.serial, session.life = session.serial + 1, world.life
        session.telnet.new_link()
        session.feed.new_link(returning)
        session.inbox.typed.charset = b""
        session.enter(State.REOPENING if returning else State.OPENING)
        try:
            session.link = self.hub.connect(world, session, session.screen.reader)
        except OSError as error:
            session.handle(Event.FAILED, error.strerror)
            return
        session.later(CONNECT_SECONDS, self._overdue)

    def _overdue(self):
        link = self.session.link
        if not (link and link.connecting):
            return False
        return self.session.handle(Event.FAILED, "no answer to the connect")

    def opened(self):
        """Hand over the address first, then log in or let the user type."""
        session, target = self.session, self.hub.world.target
        returning = session.state is State.REOPENING
        # nobody waits for a client that did not read the last link either
        session.screen.stuck = session.client.full
        path = target[1] if isinstance(target[1], str) else None
        opening = self._address_line(path)
        if session.telnet.agreement or path:
            opening += session.telnet.begin(bool(path))
        self.hub.links.suspects.came(session.who, self.hub.now)
        if returning:
            opening += session.way_back.script(path)
        session.enter(State.RETURNING if returning else State.LOGIN)
        if opening:
            session.link.send(opening)
        if not returning:
            self.show_login_screen()

    def _address_line(self, path):
        session, world = self.session, self.hub.world
        if world.word == "none" and not path or not world.told:
            return b""
        epoch = session.since if self.hub.settings.add_epoch_time else 0
        return session.dialect.address_line(session.host, epoch, world.word, path)

    def show_login_screen(self, words=b""):
        """The user must log in by himself; `words`: what the world has said on this link."""
        session, hold, way_back = self.session, self.session.hold, self.session.way_back
        hold.told = hold.told and hold.silent and not way_back.greeting
        session.screen.write(way_back.greeting)
        way_back.greeting, self.failures = None, 0
        session.screen.show(words)
        if session.character.is_guest:
            session.character.is_now(None)
        # The first output says so sooner. PennMUSH is silent at first, and forgets connects less
        # than 1 ms apart (choreography.md 2).
        session.later(1 if session.dialect.greets else 0.005, session.arrived)
        session.inbox.read_kept()
        session.refresh()

    def failed(self, reason):
        """The world did not take a link, or ended that of a return: try again, ever more slowly."""
        session = self.session
        if session.inbox.first.is_http:
            session.end_with_world()
            return
        session.place.claim_kept()
        delay = min(30, 2 ** min(self.failures, 5))
        self.failures += 1
        log.log(logging.INFO if self.failures == 1 else logging.DEBUG,
                "%s: link failed: %s; next try in %d s", session, reason, delay)
        session.drop_link()
        if session.state in COMING_BACK:
            session.wait_again(State.BACKOFF)
        if self.hub.now - self.failing_since >= TELL_FAILURE_SECONDS:
            session.hold.tell_failure()
        session.refresh()
        session.later(delay, session.handle, Event.RETRY)


def count_lines(text):
    """How many lines these are, an unfinished one included."""
    return text.count(b"\n") + bool(text and not text.endswith(b"\n"))


class Absent:
    """Stands in place of the client of a user whose line dropped, with a Stream's interface: keeps
    what he misses, the newest lines of it."""

    closed = full = connecting = False
    trail = sock = wire = None

    def __init__(self, limit, places=None, number=0):
        self.limit, self._places, self._number = limit, places, number      # of its session
        self.settled = True        # it is known what his last client has not got
        self.out, self.lost = bytearray(), 0    # text; lines that had to be left out
        self.doubtful = b""        # the last lines that his kernel took: he may have seen them
        self.count = 0             # bytes of text that have come
        self.answers = b"", 0      # what the world says to an eraser, how often that is due
        self.ended = False
        self.sent_bytes = 0
        self.owner = self.on_data = None
        self._scanner = Scanner()

    def settle(self, trail, out, unseen, doubtful, most=0):
        """His last client had this trail, and `out` was held for it: `unseen` bytes were sent and
        not acknowledged. `doubtful`: its kernel may have taken what no program has read. None:
        nobody knows how many, perhaps `most`."""
        if self.closed:
            return
        admitted, missed, lost = trail.read(unseen or 0, bool(out), most if unseen is None else 0)
        before = Absent(self.limit, self._places, self._number)
        if doubtful or unseen is None:
            before.send(admitted)
            self.doubtful, before.out = bytes(before.out), bytearray()
        before.send(missed + out)
        self.out, self.lost = before.out + self.out, lost + before.lost + self.lost
        self.count += before.count
        self.settled = True

    @property
    def marks(self):
        """As of a Stream."""
        return self.settled

    def send(self, data):
        """Keep text; telnet is noted elsewhere, and nobody is there to answer it."""
        if IAC in data or self._scanner.held:
            pieces = self._scanner.feed(bytes(data))
            data = b"".join(piece for is_command, piece in pieces if is_command is False)
        answer, due = self.answers
        if answer and due and answer in data:   # half a line was taken back: he has missed nothing
            self.answers = answer, max(0, due - data.count(answer))
            data = data.replace(answer, b"", due)
        self.out += data
        self.count += len(data)
        self._grew(len(data))
        if len(self.out) > self.limit * 5 // 4:
            self.shorten(self.limit)

    def shorten(self, limit):
        """Leave out the oldest whole lines, down to `limit` bytes."""
        size = len(self.out)
        cut = self.out.find(b"\n", max(0, size - limit)) + 1 or max(0, size - limit)
        self.lost += self.out.count(b"\n", 0, cut)
        self.out = self.out[cut:]               # anew: one that is cut keeps its memory
        self._grew(-cut)

    def _grew(self, count):
        if self._places is not None:
            self._places.grew(self._number, count)

    def finish(self):
        """There is nobody to say goodbye to."""
        self.ended = True

    def drop(self):
        """The place is given up."""
        if not self.closed:
            self.closed = True
            self._grew(-len(self.out) - len(self.doubtful))
            self.out = bytearray()

    def pause(self, *_):
        """Nobody types."""

    def resume(self):
        """Nobody types."""

    peek = read_little = follow = pause

    def pack(self, name, held=True):
        """For another process: it has no descriptor. Of what is written down for it again and
        again (not `held`) only the newest."""
        out, most = self.out, len(self.out)
        if not held and self._places is not None:
            most = self._places.written_bytes
        cut = out.find(b"\n", len(out) - most - 1) + 1 if len(out) > most else 0
        return {"fd": None, "out": pack(bytes(out[cut:])), "doubtful": pack(self.doubtful),
                "count": self.count, "lost": self.lost + out.count(b"\n", 0, cut),
                "answers": pack(self.answers)}

    def take_up(self, packed):
        """Take up what pack() of another process gave, and what has come behind it (Draft)."""
        if "answers" in packed:                 # else from an older program
            self.answers = unpack(packed["answers"])
        for text in [packed["out"], *packed.get("more", ())]:
            self.send(unpack(text))
        self.count = packed.get("count", self.count)
        self.lost += packed["lost"]
        self.doubtful = unpack(packed["doubtful"])
        self._grew(len(self.doubtful))


class Claim:
    """A login that is right for a place that is kept, or for users whose clients may be dead: it
    waits until that is known, and all that `session`, which has typed it, sends behind it."""

    def __init__(self, session, login):
        self.session, self.hub, self.login = session, session.hub, login
        self.other = None          # whose place it is to be
        self._asked = []           # [(session, client)]: does its kernel answer?
        self._since = self._asked_at = 0
        self._tries = PLACE_TRIES

    def begin(self):
        """Look for a place; whether there may be one."""
        self.other = self.hub.places.kept_for(self.session, self.login)
        if self.other:
            self.hub.later(0, self._check)
            return True
        living = self.hub.places.living_for(self.session, self.login)
        self._asked = [(it, it.client) for it in living if can_tell_life(it.client.wire)]
        if self._asked:
            self._since = self._asked_at = self.hub.clock()
            self._ask()
        return bool(self._asked)

    @property
    def _is_over(self):
        return self.session.client.closed or self.session.state is State.CLOSING

    # ---- does his client live?

    def _ask(self):
        for _, client in self._asked:
            if not client.closed:
                ask_for_life(client.wire)
        self.hub.later(LIFE_POLL_SECONDS, self._look_for_life)

    def _look_for_life(self):
        """Who acknowledges lives, and keeps his place: two clients have two links."""
        now = self.hub.clock()
        silent = [(it, client) for it, client in self._asked if not client.closed
                  and acknowledged_ago(client.wire) > now - self._since + TICK_SECONDS]
        is_one_away = any(it.place.away_at for it, _ in self._asked)
        leaves = any(has_left(client.wire) for _, client in self._asked if not client.closed)
        if self._is_over:
            self._ask_no_more()
        elif is_one_away or not (silent or leaves and now - self._since < LIFE_SECONDS):
            self._ask_no_more()
            self._look_again(is_one_away)
        elif now - self._since > LIFE_SECONDS:
            self._ask_no_more()
            for other, client in silent:
                other.place.lose(client, self.session.host)
            self._look_again(True)
        elif now - self._asked_at > 1:          # somebody else's question may have ended ours
            self._asked_at = now
            self._ask()
        else:
            self.hub.later(LIFE_POLL_SECONDS, self._look_for_life)

    def _ask_no_more(self):
        for _, client in self._asked:
            if not client.closed:
                tune(client.wire, *CLIENT_KEEPALIVE)
        self._asked = []

    def _look_again(self, may_be_kept):
        self.other = may_be_kept and self.hub.places.kept_for(self.session, self.login)
        if self.other:
            self._check()
        else:
            self._give_back()

    # ---- is his password still right?

    def _check(self):
        """Ask the heartbeat, where it can tell: it may have been changed elsewhere."""
        world = self.hub.world
        if world and world.checks and self.hub.is_up and self.session.state not in AWAY:
            self.hub.check(self.session, [self.login])
            self.hub.later(CHECK_SECONDS, self._take)
        else:
            self._take()

    def on_checked(self, verdicts):
        """The heartbeat's answer."""
        if verdicts[0] is False:
            self._give_back()
        elif self.other:
            self._take()

    # ---- the end of it

    def _take(self):
        """Go on in the place, once its session is between two states no more, nor the new client
        in the middle of its negotiation."""
        other, session = self.other, self.session
        if self._is_over or session.place.claim is not self:
            return
        if not (other.place.away_at and other.place.opens_to(session, self.login)):
            self._look_again(True)              # somebody was faster, its time or its word over
        elif (other.place.is_busy or not other.client.settled
              or other.state not in PLACES_TO_TAKE
              or session.telnet.is_settling and self._tries > PLACE_TRIES - SETTLE_TRIES):
            self._tries -= 1
            if self._tries:
                self.hub.later(PLACE_POLL_SECONDS, self._take)
            else:
                self._give_back()
        else:
            session.place.claim = None
            other.place.take_over(session)

    def _give_back(self):
        """The login is for the world, like any other."""
        session = self.session
        if session.place.claim is self:
            session.place.claim = None
            session.lines.pass_login()
            session.place.on_unclaimed()


class Place(Part):
    """A logged-in user's place in the game, which is kept when his own line drops, and how he
    comes back into it: he logs in as ever, with the same words (shared/REATTACH.md)."""

    SURVIVES = ("away_at", "gone_at", "away_host", "outdated")
    __slots__ = SURVIVES + ("claim", "looked", "left", "watch", "returns")

    def __init__(self, session):
        super().__init__(session)
        self.away_at = 0           # wall clock: since when nobody is in front; 0: somebody is
        self.gone_at = 0           # the same by the hub's clock
        self.away_host = ""        # where he was then
        self.outdated = False      # his character has logged in with another password since
        self.claim = None          # a login typed here that opens somebody's place, perhaps
        self.looked = b""          # text kept for a link in which no such login is
        self.left = False          # meanwhile the world has ended the link
        self.watch = 0             # which timer looks for the end of his time
        self.returns = ()          # times of the last takeovers

    # ---- the line drops

    def keep(self, reason, doubtful=False, farewell=""):
        """His client has gone, `reason` is "" for a plain end: keep his place; False if there is
        none. `doubtful`: its kernel may have acknowledged what no program has read."""
        session, hub, client = self.session, self.hub, self.session.client
        if not self._is_one:
            return False
        erased = session.inbox.read_last()      # in which there may be QUIT or LOGOUT
        if not self._is_one:
            return False
        self._leave_client(client, doubtful or bool(reason),
                           session.screen.spell(farewell) if farewell else b"")
        session.client.answers = session.dialect.erase_answer, erased
        self.away_at, self.gone_at, self.away_host = time.time(), hub.now, session.host
        why = f" ({reason})" if reason else ""
        session.note("lost the line, and their places are kept", f"the line dropped{why}; his "
                     f"place is kept for {hub.settings.reattach:g} s")
        hub.places.add(session)
        session.refresh()
        self.look_anew()
        return True

    def _leave_client(self, client, doubtful, farewell):
        """From now on nobody is in front. What was on the way is known at once, or when the process
        that speaks TLS has said it."""
        hub, number = self.hub, self.session.number
        absent = Absent(hub.settings.reattach_limit, hub.places, number)
        self.take_client(absent)
        trail, out, far = client.trail, bytes(client.out), client.far
        most = client.unacknowledged() + trail.slack if trail else 0
        client.follow(0)
        client.send(farewell)
        if trail and far:
            absent.settled, sent = False, 0 if out else len(farewell)

            def settle(unseen):
                unseen = None if unseen is None else max(0, unseen - sent)
                absent.settle(trail, out, unseen, doubtful, most)
                self.session.refresh()
            far.told = settle
        elif trail:
            absent.settle(trail, out, most, doubtful)
        client.drop()

    @property
    def _is_one(self):
        """Whether he is in the game, or on his way back, has not quit, and may come back to it;
        nor has he left half a line with a world that cannot forget it."""
        session, inbox, login = self.session, self.session.inbox, self.session.character.login
        return bool(self.hub.settings.reattach and login and not login.is_guest and login.password
                    and not self.away_at and not self.outdated
                    and session.state in PLACES and session.dialect.logs_in
                    and not (inbox.typed.sent and not session.dialect.erasers)
                    and not inbox.first.is_http and not inbox.has_quit()
                    and not _QUIT_LAST.search(inbox.kept + inbox.backlog))

    def lose(self, client, host):
        """This client of his does not answer, and he has come back from `host`."""
        if self.session.client is client:
            log.info("%s: its client does not answer any more", self.session)
            self.keep("it does not answer any more", doubtful=True,
                      farewell=filled(self.hub.settings.reattach_elsewhere_notice, address=host))

    def look_anew(self):
        """Begin to look whether his time is over: now, for a HUP may have brought another."""
        if self.away_at:
            self.watch += 1
            self._look(self.watch)

    def _look(self, watch):
        if watch != self.watch or self.session.client.closed or not self.away_at:
            return
        seconds = self.hub.settings.reattach
        left = self.gone_at + seconds - self.hub.now
        if not self.session.character.login:
            self.give_up("the place is given up: the world did not take his login again")
        elif left <= 0:
            self.give_up(f"did not come back in {seconds:g} s" if seconds else
                         "the place is given up: reattach is off now")
        else:
            self.hub.later(min(left, PLACE_LOOK_SECONDS), self._look, watch)

    def give_up(self, why):
        """The world sees him leave now."""
        log.info("%s: %s", self.session, why)
        self.session.end()

    def take_client(self, client):
        """This stream, or Absent, is the client from now on."""
        session = self.session
        session.client = session.inbox.client = client
        client.peek(False)                      # refresh() says whether it is anew
        client.owner, client.on_data = session, session.inbox.on_data
        session.screen.take_client(client)

    def dissolve(self):
        """The client goes on as another session: this one ends without a word. Returns its link,
        which is not closed yet (see Session.give_up_link)."""
        session, absent = self.session, Absent(0)
        absent.drop()
        session.state = State.CLOSING
        self.take_client(absent)
        link, session.link = session.link, None
        session.drop_link()
        self.hub.forget(session)
        return link

    # ---- a login is typed here

    def claims(self, login):
        """Whether this login, typed at the login screen, opens a place, or may."""
        if login.creates or login.is_guest or not login.password or self.claim:
            return False
        claim = Claim(self.session, login)
        self.claim = claim if claim.begin() else None
        return self.claim is not None

    def claim_kept(self):
        """The world has refused the link, or ended it (it is full, or his site is): a login that
        was typed for it may open a place all the same. Whether that is to be seen."""
        session, inbox = self.session, self.session.inbox
        kept = inbox.kept
        if self.claim or not self.hub.settings.reattach or not kept or kept == self.looked:
            self.left = bool(self.claim) and session.state is State.ASKING
            return bool(self.claim)
        found = self._kept_login()
        if found and session.lines.claim_kept(*found):
            self.left = session.state is State.ASKING
            return True
        inbox.kept = self.looked = kept
        return False

    def _kept_login(self):
        """(login, its bytes), if the first line that was kept is one, or None: it is kept no
        more, nor what stands before it."""
        inbox, dialect, commands, text = self.session.inbox, self.session.dialect, b"", b""
        for is_command, piece in split_commands(inbox.kept):
            commands, text = ((commands + piece, text) if is_command else
                              (commands, (text + piece).lstrip()))
        end = dialect.line_end.search(text)
        login = end and dialect.read_login(text[:end.start()].rstrip(b"\r"))
        if not login:
            return None
        inbox.kept = commands + text[end.end():]
        return login, text[:end.end()]

    def on_unclaimed(self):
        """It opens none: the end of the link is an end."""
        left, self.left = self.left, False
        if left and self.session.state is State.ASKING:
            self.session.handle(Event.LEFT)

    def opens_to(self, newcomer, login):
        """Whether `login`, typed by that session's user, is right for this place. Who reads Pueblo
        cannot go on as one who does not: the world has been told."""
        session = self.session
        return (session is not newcomer and session.state in PLACES and not session.client.closed
                and not self.outdated and session.character.opens_with(login)
                and session.screen.spelling.marked_up is newcomer.screen.spelling.marked_up)

    # ---- back

    @property
    def is_busy(self):
        """Whether it was taken so often just now that the next one must wait."""
        self.returns = tuple(it for it in self.returns if it > self.hub.now - 10)
        return len(self.returns) >= 5 and self.hub.now < self.returns[-1] + 1

    def take_over(self, newcomer):
        """The user is back: `newcomer`, who has typed his login, goes on as this session."""
        session, hub, absent, name = self.session, self.hub, self.session.client, str(self.session)
        client, rest = newcomer.client, newcomer.inbox.take_rest()
        codec = session.telnet.codec
        link = newcomer.place.dissolve()
        hub.places.remove(session)
        away, self.away_at = hub.now - self.gone_at, 0
        session.host, session.tls = newcomer.host, newcomer.tls
        hub.door.came(session)
        session.inbox.typed_at = hub.now
        self.take_client(client)
        session.telnet.join(newcomer.telnet.agreement)
        session.lines.join(newcomer.lines)
        self.follow()
        hub.keep(session)
        hub.keep(newcomer)
        if link:
            link.drop()
        session.screen.tail = newcomer.screen.tail
        session.screen.in_one_piece(lambda _: self._show_missed(absent, ago(away), codec), b"")
        self.returns += (hub.now,)
        lines = count_lines(absent.out)
        hub.door.visits.note(session.host, "are back in their places", f"{name}: is back from "
                             f"{session.host} after {ago(away)}, {lines} line{'s' * (lines != 1)} "
                             f"replayed (was session {newcomer.number})", free=60)
        absent.drop()
        hub.logins.took(session)
        session.refresh()
        session.inbox.resume()
        if rest:
            session.inbox.on_data(rest)

    def _show_missed(self, absent, away, codec):
        """Show him what he missed, which was for a client with that codec."""
        screen, ours = self.session.screen, self.session.telnet.codec
        screen.spelling = Spelling(True, screen.spelling.marked_up)
        text, doubtful = (in_other_character_set(bytes(it), codec, ours)
                          for it in (absent.out, absent.doubtful))
        settings, lines = self.hub.settings, count_lines(text)
        notices = [filled(settings.reattach_notice, time=away)]
        if self.session.host != self.away_host:
            notices.append(filled(settings.reattach_from_notice, old=self.away_host,
                                  new=self.session.host))
        if doubtful:
            screen.write("\n".join([*notices, settings.reattach_doubtful_notice]))
            screen.send(doubtful)
            notices = []
        if absent.lost:
            notices.append(filled(settings.reattach_lost_notice, lines=absent.lost))
        if text:
            notices.append(filled(settings.reattach_missed_notice, lines=lines))
        screen.write("\n".join(filter(None, notices)))
        if text:
            screen.send(text)
            screen.tail = text[-200:].rpartition(b"\n")[2]
        if text or doubtful:
            screen.write(settings.reattach_end_notice)

    def go_on(self):
        if self.away_at:
            self.gone_at = self.gone_at or self.hub.now - (time.time() - self.away_at)
            self.hub.places.add(self.session)
            self.look_anew()
        else:
            self.follow()

    def login_took(self, is_proven=True):
        """He is in, perhaps beyond doubt: else that costs nobody else his place."""
        self.outdated = False
        self.session.client.follow(0)           # what was before is not for this character
        self.follow()
        if is_proven and self.hub.settings.reattach:
            self.hub.places.login_took(self.session)

    def follow(self):
        """From now on what he is sent leaves a trail, or not: his place may have to be kept."""
        settings = self.hub.settings
        wanted = settings.reattach and self.session.character.login
        self.session.client.follow(settings.reattach_limit if wanted else 0,
                                   self.hub.places.journal)


class Session(Survivor):
    """One user. Main thread only.

    OPENING ---> LOGIN ---> PLAYING             the link is open; a login was confirmed
                   |  link ended  |
                   +---> ASKING <-+             is the world alive?  yes: CLOSING, no: WAITING
                            |
    WAITING <---------------+--- world down     the client is held and told
      | world up: its turn       BACKOFF        the world took no link: later again
      +---> REOPENING ---> RETURNING ---> PLAYING     logged in again
      +---> OPENING ---> LOGIN                  where there is no login to repeat
    CLOSING                                     what is held goes out, then the client is closed

    Timers, verdicts and connects carry `serial`, the number of the link they are about; another
    one is ignored.
    """

    SURVIVES = ("number", "serial", "life", "host", "since", "tls")
    __slots__ = SURVIVES + ("hub", "client", "link", "state", "character", "screen", "telnet",
                            "inbox", "lines", "way_back", "hold", "feed", "opening", "place")

    def __init__(self, hub, number, client, host, tls=False):
        self.hub, self.number, self.host, self.tls = hub, number, host, tls
        self.since = int(time.time())           # shown to the world, kept over returns
        self.state, self.serial = State.OPENING, 0
        self.client, self.link = client, None   # streams
        self.life = None           # of the link: the world's life
        self.character = Character()
        self.screen = Screen(self, client)
        self.telnet = Telnet(self)
        self.inbox = Inbox(self, client)
        self.lines = Lines(self)
        self.way_back = Return(self)
        self.hold = Hold(self)
        self.feed = Feed(self)
        self.opening = Opening(self)
        self.place = Place(self)
        client.owner, client.on_data = self, self.inbox.on_data
        client.read_little()

    def __str__(self):
        login = self.character.login
        name = printable(login.name.decode("utf-8", "replace") + "@") if login else ""
        return f"session {self.number} {name}{self.host}"

    # ---- states

    def handle(self, event, *arguments):
        """Do what the table says."""
        handler = self.TABLE.get((self.state, event))
        if handler:
            return handler(self, *arguments)    # see later()
        log.error("%s: a fault of HAS: %s while %s: ignored", self, event.value, self.state.value)
        return False

    def enter(self, state):
        """Go to another state."""
        if state is not self.state:
            log.debug("%s: %s -> %s", self, self.state.name, state.name)
        self.state = state
        self.refresh()

    def refresh(self):
        """Something has changed that may be worth a record, or the two flags of the fast path."""
        self.hub.changed.add(self)
        self.screen.choose_path()

    @property
    def dialect(self):
        """The family of the world, as far as it is known."""
        world = self.hub.world
        return world.dialect if world else DIALECTS.get(self.hub.settings.mush_type, UNKNOWN)

    @property
    def linked(self):
        """Whether there is an open link."""
        return self.link is not None and not self.link.connecting

    @property
    def can_talk(self):
        """Whether the user and the world can talk."""
        return self.linked and self.state in LINKED

    @property
    def can_forward(self):
        """Whether what he types goes on at once: nothing kept is before it."""
        return self.can_talk and not self.inbox.kept

    @property
    def wants_link(self):
        """Whether he has none and should."""
        return self.state is State.OPENING or self.state in AWAY

    @property
    def who(self):
        """Who this is for the world: a character, or his number where no name tells him apart."""
        return self.character.who(self.number, self.state in AWAY | COMING_BACK)

    def later(self, seconds, action, *arguments):
        """Do that then, if the link is still the same. The action returns False where that has
        changed nothing that is worth a record."""
        self.hub.later(seconds, self._due, self.serial, action, *arguments)

    def later_anyway(self, seconds, action, *arguments):
        """The same, whatever has become of the link."""
        self.hub.later(seconds, self._due, None, action, *arguments)

    def _due(self, serial, action, *arguments):
        if serial in (None, self.serial) and not self.client.closed:
            before = self.state
            if action(*arguments) is not False:
                self.note_changes(before)

    def note_changes(self, before):
        """Something has changed; `before`: the state before that. Who is in the game since then is
        written down at once: the world does not say it again."""
        self.refresh()
        if self.state is State.PLAYING and before is not State.PLAYING:
            self.hub.keep(self)

    # ---- life

    def note(self, what, line="", free=60):
        """Log what he did (in other words: `line`); returns whether: see QuietLog."""
        return self.hub.door.visits.note(self.host, what, f"{self}: {line or what}", free)

    def announce(self):
        """Say in the log that he is here, when he has spoken or stayed."""
        if not self.inbox.announced and not self.client.closed:
            how = "connected (TLS)" if self.tls else "connected"
            self.inbox.announced = self.note("connected and spoke or stayed", how)
            self.hub.changed.add(self)

    def status(self):
        """This session for admins: plain values, nothing secret, nothing that steers a terminal."""
        inbox, place = self.inbox, self.place
        away = int(self.hub.now - place.gone_at) if place.away_at else None
        return {"id": self.number, "name": self.character.name,
                "host": self.host, "state": "AWAY" if place.away_at else self.state.name,
                "age": int(time.time()) - self.since, "tls": self.tls, "away": away,
                "idle": int(self.hub.now - inbox.typed_at), "size": self.telnet.size,
                "bytes_in": inbox.bytes_in, "bytes_out": self.screen.bytes_out}

    def close(self, why, notice=""):
        """Close the client after what is held for it was sent, within FLUSH_SECONDS."""
        if self.state is State.CLOSING:
            return
        log.info("%s: %s: closing", self, why)
        self.hub.history.gone(self.number, why)
        self.screen.write(notice)
        self.screen.end_batch()
        self.drop_link()
        self.enter(State.CLOSING)
        self.later(FLUSH_SECONDS, self.end)
        self.client.finish()
        if self.client.ended:
            self.end()

    def end(self):
        """Forget this session and close what is open."""
        self.state = State.CLOSING              # nothing more for on_error() to do
        self.client.drop()
        self.drop_link()
        self.hub.forget(self)

    def end_with_world(self):
        """A client that speaks HTTP can neither be told nor brought back."""
        self.close("speaks HTTP, so it ends with its world")

    on_error = end                              # a fault of HAS in handling it (it was logged)

    # ---- streams

    def on_stream_open(self, link):
        """The link is open."""
        tune(link.wire, *LINK_KEEPALIVE, self.hub.settings.dead_after + 10)
        self.handle(Event.OPENED)

    def on_stream_full(self, stream):
        """A stream holds more than HIGH_WATER: stop reading the other one."""
        if stream is self.link:
            self.client.pause()
        elif stream is self.client:
            self.screen.on_full()

    def on_stream_room(self, stream):
        """A stream fell below LOW_WATER: read the other one again."""
        if stream is self.client:
            self.screen.on_room()
        self.inbox.resume()

    def on_stream_end(self, stream, reason):
        """One of the two streams ended; `reason` is "" for a plain end of file."""
        self.hub.burden += 1
        if stream is self.client and not self.place.keep(reason):     # else he may come back
            self.handle(Event.CLIENT_LOST if reason else Event.CLIENT_ENDED, reason)
        elif stream is self.link:
            event = Event.FAILED if self.link.connecting else Event.ENDED
            self.drop_link()
            if event is Event.ENDED and reason == FarEnd.LOST:      # that says nothing of the world
                self.handle(Event.DOWN, self.hub.offline_notice)
                self.hub.later(0, self.handle, Event.RETRY)
            else:
                self.handle(event, reason or "closed by the world")

    def note_client_gone(self, reason=""):
        """Say in the log that he has left."""
        if self.inbox.announced:
            log.info("%s: the client has left%s", self, f" ({reason})" if reason else "")
        elif not self.inbox.bytes_in:
            self.hub.door.quiet.note(self.host, "left at once without a word", level=logging.DEBUG)

    def _lose_client(self, reason):
        self.note_client_gone(reason)
        self.end()

    # ---- the link

    def arrived(self):
        """His link is no more in the way of the next one's: no change of his own."""
        self.hub.links.arrived(self)
        return False

    def drop_link(self):
        """Close the link, if there is one."""
        if self.link:
            self.link.drop()
        self.link = self.inbox.forward = None
        self.arrived()
        if self.state in COMING_BACK:
            self.hub.links.settle(self)

    def give_up_link(self):
        """Close a link that the world has not ended: a process that goes on from here must not take
        that for its doing."""
        link, self.link = self.link, None
        if link:
            if not link.ended:
                self.hub.keep(self)
            link.drop()
        self.drop_link()

    def wait_again(self, state):
        """A return has failed: what was typed meanwhile is answered as in a wait."""
        self.enter(state)
        self.inbox.read(self.inbox.release())

    def _queue(self):
        if self.link is None:
            self.hub.links.add(self)

    def _ask(self, _):
        """The link ended: he has quit, was thrown out, or the world died."""
        if self.inbox.has_quit():
            self.close("quit")
        elif self.inbox.first.is_http:
            self.end_with_world()
        elif not self.hub.is_up:                # known by now, and he is about to be told
            self._lose_link(self.hub.offline_notice)
        else:
            self.screen.show_hidden()
            self.enter(State.ASKING)
            self.hold.tell_silence()
            self.hub.ask(self)

    def _finish_client(self, _):
        """The answer to his last words is on its way; FLUSH_SECONDS are running."""
        if self.client.out:
            self.client.finish()
            self.refresh()
        else:
            self.end()

    # ---- the world

    def on_checked(self, serial, verdicts):
        """The heartbeat's answer about the pairs asked for."""
        if serial != self.serial:
            return
        if self.state in AWAY:
            self.way_back.on_checked(verdicts)
        elif self.state is State.PLAYING:
            self.feed.on_checked(verdicts)
        elif self.place.claim:
            self.place.claim.on_checked(verdicts)
        self.refresh()

    def _leave(self):
        if self.place.claim_kept():             # on_unclaimed() comes back
            return
        if self.character.pending and self.hub.world.shut:
            # its login screen's time was over; his login is for its next life
            self.enter(State.OPENING)
            self.hub.links.add(self)
        else:
            self.close("the world ended the connection (booted, timed out, refused) and lives on")

    def _lose_world(self, notice):
        if self.link:
            self.link.last_words()
        if self.inbox.has_quit():
            self.close("quit")
        if self.state not in AWAY and self.state is not State.CLOSING:
            self._lose_link(notice)

    def _lose_link(self, notice):
        """Who is on his way back, to the game or to the login screen, was told already."""
        told = self.state in COMING_BACK or self.way_back.greeting
        self.hold.begin("" if told else notice)

    def _ignore(self, *_):
        """Nothing is to be done."""
        return False

    # What happens when: {event: {states: handler}}. No row: it cannot happen.
    TABLE = {(State[name], event): handler for event, rows in {
        Event.TURN: {"OPENING WAITING BACKOFF": lambda self: self.opening.connect()},
        Event.OPENED: {"OPENING REOPENING": lambda self: self.opening.opened()},
        Event.FAILED: {"OPENING REOPENING": lambda self, why: self.opening.failed(why)},
        Event.ENDED: {
            "LOGIN PLAYING": _ask, "CLOSING": _finish_client,
            "RETURNING": lambda self, why: self.way_back.on_link_ended(why)},
        Event.LEFT: {"ASKING": _leave},
        Event.DIED: {"ASKING": lambda self: self.hold.begin(self.hub.offline_notice)},
        Event.DOWN: {
            "OPENING LOGIN PLAYING": _lose_world, "ASKING REOPENING RETURNING": _lose_link,
            "WAITING BACKOFF": lambda self, _: self.wait_again(State.WAITING),
            "CLOSING": _ignore},
        Event.RETRY: {
            "OPENING": _queue, "WAITING BACKOFF": lambda self: self.way_back.plan(),
            "LOGIN PLAYING ASKING REOPENING RETURNING CLOSING": _ignore},
        Event.TOOK: {"LOGIN PLAYING": lambda self: self.feed.on_login()},
        Event.MARKED: {"RETURNING": lambda self: self.way_back.on_end_marker()},
        Event.OVERDUE: {
            "RETURNING": lambda self: self.way_back.on_overdue(),
            "OPENING LOGIN PLAYING ASKING WAITING BACKOFF REOPENING CLOSING": _ignore},
        Event.LOGOUT: {"PLAYING": lambda self: self.feed.on_logout()},
        Event.CLIENT_ENDED: {
            "LOGIN PLAYING": lambda self, _: self.inbox.finish(),
            "OPENING ASKING WAITING BACKOFF REOPENING RETURNING": _lose_client,
            "CLOSING": lambda self, _: self.end()},
        Event.CLIENT_LOST: {
            "OPENING LOGIN PLAYING ASKING WAITING BACKOFF REOPENING RETURNING": _lose_client,
            "CLOSING": lambda self, _: self.end()},
    }.items() for names, handler in rows.items() for name in names.split()}


class Passage(Part):
    """How a session goes on in another process: one list for each of its parts (SURVIVES)."""

    __slots__ = ()
    ROOMS = {"character": Character, "screen": Screen, "telnet": Telnet, "inbox": Inbox,
             "lines": Lines, "way_back": Return, "hold": Hold, "feed": Feed, "opening": Opening,
             "place": Place}

    @property
    def parts(self):
        """Whose SURVIVES are packed together: no name stands in two of them."""
        return self.session, *[getattr(self.session, name) for name in self.ROOMS]

    def pack(self, name, held=True):
        """The session as plain values. What is under way is begun anew in the other process;
        `name` and `held` as for Stream.pack()."""
        values, link = {}, self._link()
        for part in self.parts:
            values.update(part.survivors())
        if not held:
            values.pop("tail", None)            # who knows what he was sent since
        return {"state": self._state(link).name, "values": values,
                "client": self.session.client.pack(name, held),
                "link": link and link.pack(name, held)}

    def _link(self):
        """The link, if there is one that another process can go on with."""
        session = self.session
        usable = session.linked and session.state is not State.RETURNING
        return session.link if usable else None

    def _state(self, link):
        """In which state another process takes it up, with that link."""
        state = self.session.state
        is_left = not link and state in LINKED
        return State.WAITING if is_left or state in COMING_BACK else state

    def head(self):
        """What is to be known of the session beside what its parts know."""
        client, link = self.session.client, self._link()
        return self._state(link), (client, client.marks, link, link and link.marks)

    def unpack(self, packed, take):
        """Take up what pack() gave, of this program or an older one; nothing is sent yet. `take`
        gives the socket of a name."""
        session = self.session
        for part in self.parts:
            part.take_up(packed["values"])
        if session.telnet.replay:
            session.telnet.replay.agreement = session.telnet.agreement
        if session.inbox.from_client:
            session.inbox.from_client.strict = True     # older programs had no such thing
        session.inbox.catches_up = True
        session.state = State[packed["state"]]
        session.client.take_up(packed["client"])
        if packed["link"]:
            session.link = session.hub.stream_of(packed["link"], take)
            session.link.owner, session.link.on_data = session, session.screen.reader
            session.link.take_up(packed["link"])
        elif session.state is State.LOGIN:
            session.state = State.OPENING       # one name for both, in older programs

    def fall_apart(self):
        """The session has ended, and its last timers have run out: without circles it needs no
        search for garbage, which would stop everybody for as long as there are many sessions."""
        client = self.session.client
        client.owner = client.on_data = self.session.inbox.peek = None
        for part in self.parts + (self,):
            if isinstance(part, Part):
                part.session = None

    def go_on(self):
        """Begin anew what was under way: timers, questions, connects."""
        session, hub = self.session, self.session.hub
        session.screen.stuck = session.client.full
        session.refresh()
        for part in (session.screen, session.inbox, session.lines, session.telnet, session.feed):
            part.go_on()
        if session.state is State.CLOSING:
            session.later(FLUSH_SECONDS, session.end)
            if session.client.ended and not session.link:
                session.end()
        elif session.state is State.ASKING:
            hub.ask(session)
        elif session.state is State.LOGIN and not session.feed.spoke_at:
            hub.links.watch(session)
        if session.state is State.LOGIN and session.character.unanswered:
            # its answer may have been read by a process that has died
            session.character.pending = session.character.unanswered[-1][0]
        if session.state in AWAY:
            session.hold.look(session.hold.held_since)
        session.place.go_on()
        if session.wants_link:
            session.serial += 1
            if hub.is_up:
                session.handle(Event.RETRY)


class Draft:
    """What is written down of a session, kept up to date piece by piece; what one who is away
    misses is added in records of its own (`added`: their numbers), until they are many."""

    __slots__ = ("_passage", "_seen", "_head", "_streams", "_pieces", "_written", "_added_from",
                 "added")
    PLACES = [("", Session), *[(name + ".", kind) for name, kind in Passage.ROOMS.items()]]
    NAMES = [name for _, kind in PLACES for name in kind.watched()]
    VALUES = operator.attrgetter(*[at + name for at, kind in PLACES for name in kind.watched()])
    # of what is PASSING there are numbers, and `tail`; but who knows what he was sent since
    COUNTED = [at + name for at, kind in PLACES for name in kind.PASSING if name != "tail"]
    COUNTS = operator.attrgetter(*COUNTED)
    COUNTS_TEXT = ", ".join(f'"{name.rpartition(".")[2]}": %r' for name in COUNTED)

    def __init__(self, session):
        self._passage, self._head = Passage(session), (None, None)
        self._streams = ""
        self._written = self._added_from = 0    # see Absent.count
        self.added = []
        self._seen, pieces = self._of_nobody() if session.number else (None, {})
        self._pieces = dict(pieces)             # name -> text of JSON

    @staticmethod
    @functools.lru_cache(None)
    def _of_nobody():
        """What is seen of a session just made, and its pieces: each draft begins with these."""
        hub = collections.namedtuple("Hub", "now")(0.0)
        draft = Draft(Session(hub, 0, Absent(0, None), ""))
        draft.update(None)
        return draft._seen, draft._pieces

    def _is_full(self, absent):
        return (len(self.added) >= MOST_PIECES
                or absent.count - self._added_from > max(absent.limit, WRITTEN_BYTES))

    def addition(self, number):
        """A record with that number, of what one who is away has missed since, or None."""
        absent = self._passage.session.client
        new = 0 if absent.sock else absent.count - self._written
        if not new:
            return None
        begin, self._written = self._written, absent.count
        self.added.append(number)
        return json.dumps({"values": {"number": number}, "of": self._passage.session.number,
                           "from": begin, "text": pack(absent.out[-new:])}).encode()

    def update(self, name):
        """The record, as pack() and JSON would have it, if there is something new in it; else None.
        `name` as for Stream.pack(); OSError if that fails, and it is tried again."""
        session = self._passage.session
        values, head, client = self.VALUES(session), self._passage.head(), session.client
        seen = [it if type(it) in FIXED else snapshot(it) for it in values]
        if seen == self._seen and head == self._head and (client.sock or not self._is_full(client)):
            return None
        self._note_pieces(values, seen)
        state, streams = head
        if streams != self._head[1] or not client.sock:     # what one misses grows
            link = streams[2]
            link = link and link.pack(name, False)
            self._streams = json.dumps({"link": link, "client": client.pack(name, False)})[1:-1]
        self._seen, self._head = seen, head
        if not client.sock:
            self._written = self._added_from = client.count
        values = ", ".join([*self._pieces.values(), self.COUNTS_TEXT % self.COUNTS(session)])
        return f'{{"state": "{state.name}", {self._streams}, "values": {{{values}}}}}'.encode()

    def _note_pieces(self, values, seen):
        before, pieces = self._seen or itertools.repeat(self), self._pieces
        for at in itertools.compress(itertools.count(), map(operator.ne, seen, before)):
            key, value = self.NAMES[at], values[at]
            if value:
                pieces[key] = f'"{key}": {packed_text(value)}'
            else:
                pieces.pop(key, None)


# ======================================================================
# 7. Heartbeat
#
# The thread that stays logged in to the world as a character of its own. It
# probes the world, answers the hub's questions, checks passwords and looks
# for the next address. The only place that may block; it gets values and
# gives values, never Session objects. From below: a Talk is bytes, a
# Connection what can be asked of one world, the Connector opens one, the
# Entrance has it confirmed, the Search says to which address, and the
# Heartbeat lives with it. All of them run in the heartbeat's thread only.
# ======================================================================

World = collections.namedtuple(
    "World", "address target dialect life blind checks told rights telnet shut tls word looks",
    defaults=(True, True, True, False, None, "auto", None))
World.__doc__ = """A confirmed world.

address: its Address; target: (socket family, numeric address); dialect: its Dialect
life: the life it is in, by its start id; one that begins with "?" is unknown, and new for each
    heartbeat connection
blind: the heartbeat could not log in; shut: it was refused, so the database may be broken
checks: the heartbeat may check passwords; rights: it has the flag it should have
told: the world understands the address line; telnet: it knows telnet from text
tls, word: what links need to be opened as the heartbeat's was: a Recipe of TLS or None, the
    remotehostname_cmd
looks: the name of the family it looks like, if that is another than mush_type says
"""

LOGIN_AGAIN_SECONDS = 300          # after a refused login: PennMUSH bars an address after 10
LOGIN_CLOSED_SECONDS = 30          # after one not taken for another reason: disabled, full
RENEW_SECONDS = 60                 # a world closes who stays at its login screen after 120 s
RENEW_AGAIN_SECONDS = 10           # ... where this machine's own trouble kept us from that
FASTEST_RETRY = 0.05               # seconds between tries to reach a world that is down, at first
WISH_SECONDS = 5                   # least time between tries of the address that a HUP asks for
START_ID_SECONDS = 1.1             # start ids tell lives apart that began a second apart, not less
LONG_AGO = 86400.0                 # the age of a life whose start id does not tell
LOOK_UP_SECONDS = 10               # a world that is down: its name is looked up again this often
REACH_SECONDS = 3                  # for a connect, and for the TLS handshake behind it
SEND_SECONDS = 2                   # a short line waits this long only where the world reads nothing
GREETING_SECONDS = 3               # for what a world says at connect ...
GREETING_PAUSE = 0.25              # ... which is over when nothing more comes for so long
INFO_SECONDS = 3                   # for the INFO that tells the family of an unknown world
ASIDE_SECONDS = 2                  # for answers that can be done without: rights, checks
TELNET_SECONDS = 1                 # for a telnet answer, or an offer made at connect
DEAF_SECONDS = 0.05                # ... where its last life knew no telnet
WITNESS_SECONDS = 1                # an idle connection that lives on for so long: the world lives
LOOK_SECONDS = 1                   # while a check waits for the quota, or an address for its turn
FAULT_SECONDS = 1                  # pause after a fault of HAS itself
PROBE_RESERVE = 20                 # commands of the quota that checks never use
CHECKS_A_LINE = 20                 # passwords in one line: the world stands still while it reads it
MOST_TEXT, MOST_COMMANDS = 262144, 50           # what is kept of what the world sends, the newest
LAST_WORDS = 250                   # ... and shown of its last words, if the connection ends
# What a connect says of the world: nobody answers, or listens. All else is this machine's trouble.
OF_THE_WORLD = {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT,
                errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOENT, errno.EAGAIN}


class Lost(Exception):
    """The heartbeat's connection, or a try to make one, failed; `facts` are of those named here."""

    dead = False                   # the world was silent for too long
    ours = False                   # the fault lies with this machine, not with the world
    refused = False                # nobody listens
    accepted = False               # the world, or its host, took the connection
    alive = False                  # ... and hung up, or sent something: it lives
    at_address = False             # ... and ended it when it was told a user's address

    def __init__(self, why, **facts):
        super().__init__(why)
        self.__dict__.update(facts)


class Moved(BaseException):
    """Another world was confirmed; `connection` leads to it. No error, so no `except Exception`."""

    def __init__(self, connection):
        super().__init__()
        self.connection = connection


class Stopped(BaseException):
    """HAS stops, or is replaced by a new process."""


class Context:
    """What the rooms of the heartbeat's thread have in common: the settings in force, the clock
    (seconds), the way to the hub, what the log has heard, and the one place where it waits."""

    def __init__(self, hub, hub_mailbox, settings, clock=time.monotonic):
        self.hub, self._hub_mailbox, self.settings, self.clock = hub, hub_mailbox, settings, clock
        self.mailbox, self.stopping = Mailbox(), False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.mailbox.reader, READ, None)
        self.said = {}             # subject -> what the log heard of it last; for log_change()

    def tell(self, call, *arguments):
        """Have the hub run one of its methods."""
        self._hub_mailbox.post(call, *arguments)

    def heard(self, event, *arguments):
        """Tell the hub what was heard of the world: an event of Health."""
        self.tell(self.hub.heard, event, *arguments)

    def log_change(self, level, subject, text):
        """Log a text about a subject; at DEBUG, if that is what was said of it the last time."""
        log.log(logging.DEBUG if self.said.get(subject) == text else level, "%s", text)
        self.said[subject] = text

    def watch(self, sock, reader, events=READ):
        """Have reader.receive() called when something comes, until reader.ended is not None."""
        self._selector.register(sock, events, reader)

    def close(self, sock):
        """Close a socket that may be watched."""
        if sock.fileno() >= 0 and sock in [it.fileobj for it in self._selector.get_map().values()]:
            self._selector.unregister(sock)
        hang_up(sock)

    def wait(self, until):
        """Serve the mailbox and read what comes, until something came or the time `until`."""
        for key, _ in self._selector.select(max(0.0, until - self.clock())):
            if key.data is None:
                self.mailbox.run()
            else:
                key.data.receive()
                if key.data.ended is not None:
                    self._selector.unregister(key.fileobj)
        if self.stopping:
            raise Stopped


_OWN_MARK = re.compile(rb"=[0-9a-f]{10,12}=[aze]?")


def _new_nonce():
    return b"=" + secrets.token_hex(6).encode() + b"="


class Talk:
    """Text and telnet commands to and from one world. Whoever waits gets Lost when it ends."""

    def __init__(self, sock, context, secret):
        self.sock, self._context, self._secret = sock, context, secret
        self.clock = context.clock
        self.scanner = Scanner()
        self.spoke = False         # anything was received
        self.text = b""            # received and not yet looked at
        self.commands = []         # telnet commands received
        self.ended = None          # why the connection ended
        self._heard = b""          # the text received since send()
        self.greeted = False       # hear_greeting() has heard some
        context.watch(sock, self)

    def close(self):
        self._context.close(self.sock)

    def receive(self):
        """Read what has come."""
        try:
            data = self.sock.recv(CHUNK)
        except NOT_NOW:
            return
        except OSError as error:
            self.ended = error.strerror or str(error)
            return
        acknowledge(self.sock)
        self.spoke = self.spoke or bool(data)
        if not data:
            self.ended = "closed by the world"
        for is_command, piece in self.scanner.feed(data):
            if is_command:
                self.commands = self.commands[-MOST_COMMANDS:] + [piece]
            else:
                self.text = (self.text + piece)[-MOST_TEXT:]
                self._heard = (self._heard + piece)[-2 * LAST_WORDS:]

    def send(self, data):
        """Send a short line."""
        self._heard = b"" if self.ended is None else self._heard
        try:
            self.sock.settimeout(SEND_SECONDS)
            self.sock.sendall(data)
            self.sock.setblocking(False)
        except OSError as error:
            self.ended = self.ended or f"cannot send: {error}"
            raise self.lost() from None

    def lost(self, why=None):
        """A Lost that says why, with the world's last words: "not allowed from this host" explains
        much. Not with marks: those are other words at each try."""
        lines = [line.strip() for line in _OWN_MARK.sub(b"", self._heard).split(b"\n")
                 if re.search(rb"[A-Za-z\x80-\xff]", line)]
        words = printable(b" ".join(lines[-3:]))
        hidden = not words or self._secret in words
        shown = "" if hidden else f'; its last words: "{words[:LAST_WORDS]}"'
        return Lost((why or self.ended) + shown, accepted=True,
                    alive=self.ended is not None or self.spoke)

    def goes_on(self, until):
        """Wait for more; False when the time is over."""
        if self.ended is not None:
            raise self.lost()
        if self.clock() >= until:
            return False
        self._context.wait(until)
        return True

    def _await(self, find, seconds):
        until = self.clock() + seconds
        while True:
            match = find()
            if match or not self.goes_on(until):
                return match

    def expect(self, pattern, seconds):
        """Wait for text that matches, and take it and all before it; return the match, or None."""
        match = self._await(lambda: pattern.search(self.text), seconds)
        if match:
            self.text = self.text[match.end():]
        return match

    def expect_command(self, pattern, seconds):
        """Wait for a telnet command that matches; return the match, or None."""
        return self._await(
            lambda: next(filter(None, map(pattern.search, self.commands)), None), seconds)

    def ask(self, line, pattern, seconds):
        """Send a line and wait for text that matches; return the match, or None."""
        self.send(line)
        return self.expect(pattern, seconds)

    def hear_greeting(self):
        """Wait until the world has said what it says at connect."""
        until, quiet = self.clock() + GREETING_SECONDS, False
        while self.clock() < until and not quiet and self.ended is None:
            seen = len(self.text) + len(self.commands)
            self._context.wait(min(until, self.clock() + GREETING_PAUSE) if seen else until)
            quiet = seen and seen == len(self.text) + len(self.commands)
        self.greeted = bool(self.text.strip())


class Quota:
    """A token bucket: a world takes `most` commands (None: any), then one a second. Pure."""

    def __init__(self, most, clock, tokens=None):
        self._most, self._clock, self._filled = most, clock, clock()
        self._tokens = most if tokens is None else tokens

    def spare(self):
        """How many commands may be sent at once."""
        if not self._most:
            return 10 ** 6
        now = self._clock()
        self._tokens = min(self._most, self._tokens + now - self._filled)
        self._filled = now
        return self._tokens

    def spend(self):
        self._tokens = self.spare() - 1


class Connection:
    """One heartbeat connection: the World behind it, as far as it is known, and what can be asked
    of that. Every question raises Lost when the connection ends instead."""

    def __init__(self, talk, address, target, settings):
        self.talk, self.settings = talk, settings
        self.world = World(address, target, PLAIN, None, False, False,
                           tls=settings.recipes["world"] if settings.world_tls else None,
                           word=settings.remotehostname_cmd)
        self.quota = Quota(None, talk.clock)
        self._was_deaf = False     # see identify()
        self.renew_at = None       # when a connection at the login screen must be made anew

    def note(self, **facts):
        """That is known of the World now."""
        self.world = self.world._replace(**facts)

    @property
    def dialect(self):
        """The family, PLAIN until it is known."""
        return self.world.dialect

    @property
    def address(self):
        """The Address of the world."""
        return self.world.address

    @property
    def lacks_something(self):
        """Whether the world could give more than it does, once somebody has mended it."""
        world = self.world
        return world.blind or not (world.rights and world.told and world.dialect.logs_in)

    def close(self):
        self.talk.close()

    # ---- who are you?

    def identify(self, known, try_address, was_deaf=False):
        """Find the family (`known`, if it was found before), the start id, which is constant over
        in-place restarts and new at each start, whether the world knows telnet (`was_deaf`: it did
        not), and with `try_address` whether users' addresses can be told."""
        self._was_deaf = was_deaf
        if self.address.path:
            self.talk.send(UNIX_DIALECT.address_line("127.0.0.1", 0, "auto", self.address.path))
        dialect = known or self._recognise()
        self.note(dialect=dialect)
        self.quota = Quota(dialect.quota, self.talk.clock)
        if dialect.address_may_be_refused and self.world.word != "none":
            self.note(told=try_address and self._understands_address())
        self.note(life=self._start_id() or f"?{secrets.token_hex(4)}")
        self.note(telnet=not dialect.end_command or bool(self.talk.commands)
                   or self._knows_telnet())

    def _recognise(self):
        talk, answer = self.talk, None
        talk.hear_greeting()
        banner = b"".join(talk.commands) + talk.text
        if talk.ended is not None:
            raise talk.lost()
        dialect, how = recognise(banner, b""), "by what it sends at connect"
        if dialect is None:
            answer = talk.ask(b"INFO\r\n", _INFO_BLOCK, INFO_SECONDS)
            dialect = recognise(banner, answer.group() if answer else b"")
            how = "by its answer to INFO"
        if dialect is None and not banner and not talk.text.strip():
            raise talk.lost("it took the connection but does not answer")
        if dialect is None:
            log.warning("%s: the family of this world was not recognised: HAS serves it as "
                        "`plain`, without logins; set mush_type", self.address)
            return PLAIN
        log.info("%s: the world is a %s, recognised %s", self.address, dialect.name, how)
        return dialect

    def _understands_address(self):
        """Whether the address line is taken in silence, between two questions: who does not know it
        shows the login screen again."""
        talk = self.talk
        line = self.dialect.address_line("127.0.0.1", 0, self.world.word, None)
        talk.send(b"INFO\r\n" + line + b"INFO\r\n")
        try:
            answer = talk.expect(_INFO_TWICE, self.settings.hb_timeout)
        except Lost as lost:
            lost.at_address = True
            raise
        if not answer:
            raise talk.lost("it took the connection but does not answer")
        # RhostMUSH with ssl_welcome 1 says nothing before the line, and its banner behind it
        # (worlds/rhostmush.md f)
        greeted = talk.greeted or answer.group(1).strip()
        if not (greeted and answer.group(2).strip()):
            return True
        log.warning("%s: the world does not know the line that hands over addresses, so it is not "
                    "sent; switch it on there (README), then kill -HUP, or set "
                    "remotehostname_cmd = none", self.address)
        return False

    def _start_id(self):
        dialect, seconds = self.dialect, self.settings.hb_timeout
        if not dialect.start_question:
            return None
        if dialect.start_command:               # only who offers it: others take it as text
            if not self._sees(dialect.start_command):
                return None
            self.talk.send(dialect.start_question)
            answer = self.talk.expect_command(dialect.start_answer, seconds)
        else:
            answer = self.talk.ask(dialect.start_question, dialect.start_answer, seconds)
        if not answer:
            raise self._silent("it took the connection but does not answer")
        if not dialect.start_command:
            self._compare_family(answer.string[:answer.end()])
        return f"{self.address} since {printable(answer.group(1))}"

    def _sees(self, command):
        """Whether that telnet command has come, or comes now."""
        seconds = DEAF_SECONDS if self._was_deaf else TELNET_SECONDS
        return bool(self.talk.expect_command(re.compile(re.escape(command)), seconds))

    def _knows_telnet(self):
        """Some TeenyMUSHes offer nothing and yet answer; others take telnet for text
        (worlds/teenymush.md a): the line end takes that off the next line."""
        self.talk.send(self.dialect.end_question + b"\r\n")
        return self._sees(self.dialect.end_command)

    def look_at_family(self):
        """Something did not work as mush_type promises: whether the world is of another family."""
        if self.settings.mush_type != "auto" and not self.world.looks:
            info = self.talk.ask(b"INFO\r\n", _INFO_BLOCK, ASIDE_SECONDS)
            self._compare_family(info.group() if info else b"")
        return bool(self.world.looks)

    def _compare_family(self, info):
        looks = recognise(b"".join(self.talk.commands) + self.talk.text, info)
        if self.settings.mush_type != "auto" and looks not in (None, self.dialect):
            self.note(looks=looks.name)

    def _silent(self, where):
        """The Lost of a world that does not answer what its family would."""
        with contextlib.suppress(Lost):         # it has ended meanwhile: why we gave up counts
            self.look_at_family()
        looks = self.world.looks
        return self.talk.lost(
            where + (f"; it looks like a {looks}: is mush_type right?" if looks else ""))

    # ---- the login

    def log_in(self, login):
        """Log in and have a probe answered. False if the login did not take: see world.shut, and
        talk.ended, for a world may hang up on it (logins disabled, full)."""
        talk, proof = self.talk, proof_for(self.dialect, True, self.world.telnet)
        until = overdue = talk.clock() + self.settings.hb_timeout
        talk.commands.clear()
        talk.send(proof.script(login))
        while not proof.ended and talk.clock() < until:
            talk.text, news = proof.hear(talk.text)
            if News.ASK in news:
                overdue = talk.clock() + END_SECONDS
                talk.send(proof.question())
            if any(map(proof.saw_command, talk.commands)) or (
                    proof.asked and talk.clock() >= overdue):
                proof.end()
            if not proof.ended:
                if talk.ended is not None and not proof.login:
                    return False
                talk.goes_on(min(until, overdue))
        if not proof.ended:
            raise self._silent("it does not answer to the heartbeat's login")
        self.note(shut=proof.refused)
        if proof.login and not self.ask(self.settings.hb_timeout):
            raise talk.lost("the heartbeat is logged in but gets no answer")
        return bool(proof.login)

    def look_at_rights(self, login):
        """Find out whether the heartbeat may do what it is for; a WARNING says what it lacks."""
        dialect = self.dialect
        if not (dialect.check_function or dialect.flag_question):
            return
        if dialect.check_function:
            rights = self.verdicts([login]) == [True]
            self.note(checks=rights, rights=rights)
            lack = ("may not check passwords: set its {flag} flag, then kill -HUP; until then a "
                    "login counts by the world's own words")
        else:
            nonce = _new_nonce()
            answer = self._think(b"think %s %s %s\r\n" % (nonce, dialect.flag_question, nonce),
                                 nonce)
            is_known = self.settings.mush_type != "auto"
            self.note(rights=answer == b"1" if is_known else answer != b"0")
            lack = ("has no {flag} flag: it cannot get back in while logins are disabled or the "
                    "game is full: set it, then kill -HUP")
        if not self.world.rights and not self.look_at_family():
            log.warning("%s: the heartbeat %s %s", self.address, self.settings.hb_user,
                        lack.format(flag=dialect.needed_flag))

    def stay_outside(self):
        """Watch from the login screen, where HAS does not get in."""
        self.note(blind=True)
        self.renew_at = self.talk.clock() + RENEW_SECONDS
        if not self._ask_at_login_screen(self.settings.hb_timeout):
            raise self.talk.lost("it does not answer at the login screen")

    # ---- questions

    def question(self, seconds):
        """Ask whether the world lives; True if it was answered within `seconds`."""
        if self.dialect.logs_in:
            return self._ask_at_login_screen(seconds) if self.world.blind else self.ask(seconds)
        until = self.talk.clock() + WITNESS_SECONDS
        while self.talk.goes_on(until):
            pass
        return True

    def ask(self, seconds):
        """Send one probe; True if its own answer came as a whole line."""
        nonce = _new_nonce()
        self.quota.spend()
        answer = re.compile(rb"(?m)^" + nonce + rb"\r?\n")
        return bool(self.talk.ask(self.dialect.probe(nonce), answer, seconds))

    def _ask_at_login_screen(self, seconds):
        line, pattern = self.dialect.login_probe
        nonce = _new_nonce()
        self.talk.text = b""
        answer = re.compile(pattern.pattern.replace(b"%(n)s", nonce))
        return bool(self.talk.ask(line.replace(b"%(n)s", nonce), answer, seconds))

    def _think(self, line, nonce):
        """Send a line whose answer stands between two nonces; return that, or None."""
        self.quota.spend()
        answer = re.compile(rb"(?m)^%s (.*) %s\r?\n" % (nonce, nonce))
        answer = self.talk.ask(line, answer, ASIDE_SECONDS)
        return answer and answer.group(1)

    def can_ask(self, pairs):
        """Whether one line can ask about all these pairs."""
        return self.world.checks and self._check_line(pairs, _new_nonce()) is not None

    def _check_line(self, pairs, nonce):
        line = self.dialect.check(pairs, nonce)
        return line if line is not None and len(line) <= self.dialect.longest_line else None

    def verdicts(self, pairs):
        """Ask about all `pairs` in one line; for each of them True, False or None (unknown)."""
        nonce = _new_nonce()
        line = self._check_line(pairs, nonce)
        answer = line and self._think(line, nonce)
        verdicts = [] if answer is None else self.dialect.verdicts(answer)
        return verdicts if len(verdicts) == len(pairs) else [None] * len(pairs)

    # ---- a new process in place of this one

    _PARKED = ("life", "blind", "checks", "told", "rights", "telnet", "target", "shut", "word",
               "looks")

    def park(self, leave=True):
        """What a new process needs to go on with this connection, whose socket is left open, and
        to it; or a copy, of what is known now."""
        values = {name: getattr(self.world, name) for name in self._PARKED}
        values.update(renew_at=self.renew_at, text=self.talk.text if leave else b"")
        sock = self.talk.sock
        return {"fd": sock.detach() if leave else os.dup(sock.fileno()),
                "address": str(self.address), "dialect": self.dialect.name,
                "held": pack(self.talk.scanner.held if leave else b""),
                "spare": self.quota.spare(),
                "values": {name: pack(value) for name, value in values.items()}}

    @classmethod
    def unpark(cls, left, context):
        """The connection that park() left."""
        sock, settings = socket.socket(fileno=left["fd"]), context.settings
        sock.setblocking(False)
        values = {name: unpack(value) for name, value in left["values"].items()}
        text, renew_at = values.pop("text"), values.pop("renew_at")
        if "refused" in values:                 # its older name
            values["shut"] = values.pop("refused")
        family, target = values["target"]
        values["target"] = socket.AddressFamily(family), target
        address, dialect = parse_address(left["address"]), DIALECTS[left["dialect"]]
        held = unpack(left["held"])
        talk = Talk(sock, context, settings.hb_pass)            # nothing fails from here on
        talk.text, talk.scanner.held = text, held
        connection = cls(talk, address, None, settings)
        connection.renew_at = renew_at
        connection.note(dialect=dialect, tls=None,              # the socket of TLS is never parked
                        **{name: values[name] for name in cls._PARKED if name in values})
        connection.quota = Quota(dialect.quota, talk.clock, left["spare"])
        return connection


class AddressBook:
    """Where addresses lead: a target is (socket family, numeric address).

    Nothing is looked up in the way of an answer, and DNS may fail. So a name that led to a world is
    looked up again only when it has led nowhere for LOOK_UP_SECONDS, and another world's name in a
    thread of its own, which touches nothing here but `post`, that of the heartbeat's mailbox.
    """

    def __init__(self, post, clock):
        self._post, self._clock = post, clock
        self._led = {}             # Address -> the target that led to its world the last time
        self._nowhere = {}         # Address -> since when, or when it was looked up since
        self._asked = set()        # the Addresses that such a thread looks up
        self._found = {}           # Address -> a list of targets that it found, or its exception

    def leads(self, address, target):
        """That target led to the world."""
        self._led[address] = target
        self._nowhere.pop(address, None)

    def leads_nowhere(self, address):
        """Nothing led to the world."""
        self._nowhere.setdefault(address, self._clock())

    def forget_all_but(self, address):
        """The settings have changed; where users are is still known, whatever DNS says."""
        self._led = {it: target for it, target in self._led.items() if it == address}
        self._nowhere.clear()

    def targets(self, address):
        """A list of targets to try; OSError or UnicodeError. Blocks for DNS, if it must."""
        known, since = self._led.get(address), self._nowhere.get(address)
        if known and (since is None or self._clock() < since + LOOK_UP_SECONDS):
            return [known]
        self._nowhere[address] = self._clock()
        try:
            found = self._found.pop(address, None) or self.look_up(address)
            if isinstance(found, Exception):
                raise found
            return found
        except (OSError, UnicodeError) as error:
            if not known:
                raise
            log.debug("%s: cannot be looked up: %s; tried on where it was", address, error)
            return [known]

    def is_at_hand(self, address):
        """Whether targets() will not block; if it would, a look-up is begun."""
        if address.path or address in self._led or address in self._found or _is_numeric(
                address.host):
            return True
        if address not in self._asked:
            self._asked.add(address)
            threading.Thread(target=self._look_up_beside, args=(address,), name="look-up",
                             daemon=True).start()
        return False

    def _look_up_beside(self, address):
        try:
            found = self.look_up(address)
        except Exception as error:              # told where the address is tried
            found = error
        self._post(self._on_found, address, found)

    def _on_found(self, address, found):
        self._asked.discard(address)
        self._found[address] = found

    @staticmethod
    def look_up(address):
        """The targets of an address, without this book. Blocks for DNS."""
        if address.path:
            return [(socket.AF_UNIX, address.path)]
        found = socket.getaddrinfo(address.host, address.port, 0, socket.SOCK_STREAM)
        return list(dict.fromkeys((family, target) for family, _, _, _, target in found))


class _Dial:
    """A connect under way, for Context.watch(): it is over when anything is said of its socket."""

    ended = None

    def receive(self):
        """The socket may be written to, or has failed."""
        self.ended = ""


class Connector:
    """Opens a Connection to an address, over TLS if that is wanted."""

    def __init__(self, context, book):
        self._context, self._book = context, book
        self.round_trip = 0.0      # seconds to the kernel there and back: the world may be busy

    def open(self, address):
        """A Connection to an address; Lost says whose fault it is that there is none."""
        try:
            sock, target = self._reach(address)
        except (OSError, UnicodeError) as error:
            self._book.leads_nowhere(address)
            number = getattr(error, "errno", None)
            ours = isinstance(error, socket.gaierror) or number not in OF_THE_WORLD
            raise Lost(getattr(error, "strerror", None) or str(error), ours=ours, refused=not ours
                       and number in (errno.ECONNREFUSED, errno.ENOENT)) from None
        settings = self._context.settings
        if settings.world_tls:
            sock = self._wrap(sock, address)
        self._book.leads(address, target)
        talk = Talk(sock, self._context, settings.hb_pass)
        return Connection(talk, address, target, settings)

    def _reach(self, address):
        """(a connected socket, the target); the last target's OSError where none answers."""
        failure = None
        for target in self._book.targets(address):
            try:
                return self._connect(target), target
            except OSError as error:
                failure = error
        raise failure

    def _connect(self, target):
        """A connected non-blocking socket; OSError."""
        sock, settings = begin_connect(target), self._context.settings
        try:
            self._await(sock)
            error = connect_error(sock)
            if error:
                reset(sock)
                raise error
            if not isinstance(target[1], str) and target[1][1] in (
                    settings.local_port, settings.local_port_ssl) and _is_ours(
                        target[1][0], {"local_address": settings.local_address}):
                raise OSError(errno.ELOOP, "that is HAS itself: give the port of the MUSH")
            tune(sock, *LINK_KEEPALIVE)
            return sock
        except BaseException:
            sock.close()
            raise

    def _await(self, sock):
        """Wait until the connect is over; OSError where that takes too long."""
        context, dial = self._context, _Dial()
        began = context.clock()
        until = began + REACH_SECONDS
        context.watch(sock, dial, WRITE)
        try:
            while dial.ended is None:
                if context.clock() >= until:
                    raise OSError(errno.ETIMEDOUT, "no answer to the connect")
                context.wait(until)
            self.round_trip = context.clock() - began
        except BaseException:
            context.close(sock)
            raise

    def _wrap(self, sock, address):
        """The TLS handshake with the world. All that a Lost says of it here is that it lives."""
        try:
            sock.settimeout(REACH_SECONDS)
            tls = self._context.settings.world_tls
            sock = tls.wrap_socket(sock, server_hostname=address.host)
            sock.setblocking(False)
            return sock
        except (OSError, ValueError) as error:
            sock.close()
            raise Lost(f"TLS: {tls_reason(error)}", accepted=True, ours=True) from None


def _age_by_start_id(life):
    """Seconds since the start that a start id names, by this machine's clock."""
    text = life.rpartition(" since ")[2]
    try:
        began = int(text) if text.isdigit() else time.mktime(time.strptime(text))
    except (ValueError, OverflowError):
        return LONG_AGO
    age = time.time() - began
    return age if age >= 0 else LONG_AGO        # another clock


class Lives(Survivor):
    """The names of the lives of worlds: start ids, unless those prove nothing. Pure.

    A world that dies in the second of its start, and is started again at once, has the same start
    id: what follows such a life has another name, and what follows one behind which none listened.
    """

    SURVIVES = "life", "renamed"

    def __init__(self, clock):
        self._clock = clock
        self.life = None, 0.0                   # the one we were in last; when it was first seen
        self.renamed = None, None               # a start id that proves nothing; its life's name

    def name(self, start_id):
        """The name of the life that has this start id."""
        return self.renamed[1] if start_id == self.renamed[0] else start_id

    def enter(self, life):
        """We are in that life; the first one that we see began before we looked."""
        if life != self.life[0]:
            age = 0.0 if self.life[0] else _age_by_start_id(life)
            self.life = life, self._clock() - age

    def doubt(self):
        """The connection was lost: this life may have ended in its first second."""
        if self._clock() - self.life[1] < START_ID_SECONDS:
            self.rename()

    def rename(self):
        """Whatever its start id, what follows is another life."""
        life, (start_id, name) = self.life[0], self.renamed
        if life:
            start_id = start_id if life == name else life
            self.renamed = start_id, f"{start_id} ({secrets.token_hex(4)})"


class LoginPause(Survivor):
    """When a login may be tried: after `login_after`, or in another life of the world. Pure."""

    SURVIVES = "login_after", "login_life", "login_refused"

    def __init__(self, clock):
        self._clock, self.login_after = clock, 0.0
        self.login_life, self.login_refused = None, False       # refused: or not taken otherwise

    def begin(self, seconds):
        """One did not show whether it was taken: the world is of another family."""
        self.login_after = self._clock() + seconds

    def begin_in(self, life, refused):
        """One was not taken in that life; return for how long none is tried."""
        seconds = LOGIN_AGAIN_SECONDS if refused else LOGIN_CLOSED_SECONDS
        self.begin(seconds)
        self.login_life, self.login_refused = life, refused
        return seconds

    def end(self):
        """The settings have changed, or the life is over."""
        self.login_after = 0.0

    def holds_in(self, life):
        """Whether a login must wait in that life."""
        return self._clock() < self.login_after and (
            life.startswith("?") or life == self.login_life)


class Entrance:
    """The way into a world: from its address to a Connection that is recognised, logged in where
    that can be, and confirmed by an answered probe."""

    def __init__(self, context, connector, lives):
        self._context, self._connector, self._lives = context, connector, lives
        self.pause = LoginPause(context.clock)
        self._known = {}           # Address -> Dialect as recognised
        self._untold = set()       # Addresses where the word that hands over addresses ends it
        self._deaf = set()         # ... and where the last life of the world knew no telnet
        self._shut_out = False     # the last login was not taken, and the log says so

    def on_settings(self, other_worlds):
        """New settings are in force: maybe other addresses, or another mush_type."""
        if other_worlds:
            self._known.clear()
        self._untold.clear()
        self.pause.end()

    def survivors(self):
        """For a new process, as Survivor has it."""
        return {"known": [[str(address), it.name] for address, it in self._known.items()]}

    def take_up(self, values):
        known = {_address_or_none(address): name for address, name in values["known"]}
        self._known = {address: DIALECTS[name] for address, name in known.items() if address}

    def establish(self, address):
        """A confirmed Connection to an address; Lost says why there is none."""
        connection = self._identified(address)
        if not connection.dialect.logs_in:
            self._or_close(connection, connection.question, WITNESS_SECONDS)
        elif not self._or_close(connection, self._log_in, connection):
            connection = self._stay_outside(connection)
        looks = connection.world.looks
        if looks:
            self._context.log_change(
                logging.WARNING, (address, "looks"),
                f"{address}: mush_type = {connection.dialect.name}, but the world looks like a "
                f"{looks}: set mush_type = {looks} (or auto), then kill -HUP")
        return connection

    def _stay_outside(self, connection):
        """The login was not taken: stay at the login screen, or get in after all."""
        if connection.talk.ended is not None:
            connection.close()
            life, connection = connection.world.life, self._identified(connection.address)
            if life != connection.world.life:   # it did not hang up on us: it died, and is back
                self.pause.end()
                if self._or_close(connection, self._log_in, connection):
                    return connection
        self._or_close(connection, connection.stay_outside)
        return connection

    @staticmethod
    def _or_close(connection, call, *arguments):
        """call(*arguments); the connection is closed if that fails."""
        try:
            return call(*arguments)
        except BaseException:
            connection.close()
            raise

    def _identified(self, address):
        """A Connection whose family and life are known; Lost."""
        mush_type = self._context.settings.mush_type
        known = self._known.get(address) if mush_type == "auto" else DIALECTS[mush_type]
        connection = self._connector.open(address)
        facts = known, address not in self._untold, address in self._deaf
        try:
            self._or_close(connection, connection.identify, *facts)
        except Lost as lost:
            if not lost.at_address:
                raise
            connection = self._connector.open(address)
            self._or_close(connection, connection.identify, known, False)
            self._untold.add(address)           # it lives, and does without the line
            log.warning("%s: the world hangs up on the line that hands over addresses (%s), so it "
                        "is not sent; allow HAS there (README), then kill -HUP, or set "
                        "remotehostname_cmd = none", address, lost)
        if connection.dialect is not PLAIN:
            self._known[address] = connection.dialect
        (self._deaf.discard if connection.world.telnet else self._deaf.add)(address)
        connection.note(life=self._lives.name(connection.world.life))
        return connection

    def _log_in(self, connection):
        """Try to log the heartbeat in, unless that was refused just now; whether it is in."""
        if self.pause.holds_in(connection.world.life):
            connection.note(shut=self.pause.login_refused)
            return False
        context, settings = self._context, self._context.settings
        login = Credentials(b"connect", settings.hb_user.encode(), settings.hb_pass.encode())
        if connection.log_in(login):
            context.log_change(
                logging.INFO if self._shut_out else logging.DEBUG, "login",
                f"{connection.address}: the heartbeat {settings.hb_user} is logged in now")
            self._shut_out = False
            connection.look_at_rights(login)
            return True
        self._shut_out = True
        if connection.talk.ended is None and connection.look_at_family():
            self.pause.begin(LOGIN_AGAIN_SECONDS)
        else:
            self._say_not_taken(connection, settings)
        if context.settings is not settings:    # new ones came meanwhile: it was not their login
            self.pause.end()
        return False

    def _say_not_taken(self, connection, settings):
        world, talk = connection.world, connection.talk
        pause = self.pause.begin_in(world.life, world.shut)
        what = (f"refuses the heartbeat's login (hb_user = {settings.hb_user}): mend hb_user and "
                "hb_pass, or make the character (README), then kill -HUP." if world.shut else
                "does not take the heartbeat's login "
                f"({talk.lost(talk.ended or 'it does not let it in')}): are logins disabled, or is "
                "it full?")
        loss = ", but passwords cannot be checked" if world.dialect.check_function else ""
        self._context.log_change(
            logging.WARNING, "login", f"{world.address}: the world {what} Users are kept and "
            f"brought back all the same{loss}; next try every {pause} s")


def _address_or_none(text):
    """An Address that an older program took; None if it is refused today."""
    try:
        return parse_address(text) if text else None
    except ValueError:
        return None


class Course:
    """Which address users are on, which is tried next, and how soon. Pure."""

    def __init__(self, clock):
        self._clock = clock
        self.current = None        # the Address users are on
        self.wanted = None         # the Address a HUP asks for, not yet confirmed
        self.down_since = None
        self._try_at = 0.0         # when the next other address may be tried
        self._answering_since = None            # how long the preferred address has answered

    def on_settings(self, first):
        """New settings are in force; with `first`, the preferred address, they ask for a move."""
        self._try_at = 0.0
        if first:
            self.wanted = first if first != self.current else None

    def on_down(self):
        """The world is down: another one may take over after failover_after."""
        self.down_since = self.down_since or self._clock()

    def arrive(self, address):
        """Users are on that address now."""
        self.current, self.down_since = address, None
        if self.wanted == address:
            self.wanted = None

    def candidates(self, settings):
        """The addresses to try now, in order, while users are on none."""
        addresses = settings.mush_address
        stay = self.current if self.current in addresses else addresses[0]
        first = self.wanted or stay
        others = [it for it in [self.current] + addresses if it and it != first]
        if self.wanted:
            return [first] + others[:1]
        down = self.down_since is not None and self._clock() - self.down_since
        fails_over = settings.failover_after and down and down >= settings.failover_after
        return [first] + others if fails_over else [first]

    def pace(self, settings, round_trip):
        """Seconds until the next try: 20 a second in the first minute of an outage, for a refused
        connect on this machine costs 50 us; then ever fewer, down to one in `retry`. Far worlds as
        their round trip allows (seconds)."""
        now = self._clock()
        minutes = (now - (self.down_since or now)) / 60
        fastest = max(FASTEST_RETRY, 10 * round_trip)
        return min(settings.retry, fastest * 2 ** max(0.0, minutes - 1))

    def other(self, settings):
        """The address to try while users are on another: the wanted or preferred one."""
        preferred = settings.mush_address[0]
        fails_back = settings.failback_after and self.current != preferred
        due = self._clock() >= self._try_at and (self.wanted or fails_back)
        return (self.wanted or preferred) if due else None

    def begin_try(self, settings):
        """other() is tried now; return whether a HUP asks for it."""
        pause = max(WISH_SECONDS, settings.retry) if self.wanted else settings.beat
        self._try_at = self._clock() + pause
        return self.wanted is not None

    def is_to_move(self, wanted, settings, answers):
        """Whether to move to the address that was tried. `answers`: a world is confirmed there."""
        if wanted:
            return answers
        now = self._clock()
        since = self._answering_since or now
        moves = answers and now - since >= settings.failback_after
        self._answering_since = since if answers and not moves else None
        return moves

    def survivors(self):
        """For a new process, as Survivor has it."""
        return {"current": str(self.current or ""), "wanted": str(self.wanted or ""),
                "down_since": self.down_since}

    def take_up(self, values):
        self.current, self.wanted = (_address_or_none(values[it]) for it in ("current", "wanted"))
        self.down_since = values["down_since"]


class Search:
    """Finds the world that users are to be on: any, when they are on none, or a better one."""

    def __init__(self, context, course, entrance, book, lives, rest):
        self._context, self._course, self._entrance = context, course, entrance
        self._book, self._lives = book, lives
        self._rest = rest          # waits between two rounds

    def find(self):
        """Try the addresses until one is confirmed; return its Connection."""
        while True:
            for address in self._course.candidates(self._context.settings):
                try:
                    return self._entrance.establish(address)
                except Lost as lost:
                    self._note_failure(address, lost)
                except Exception as error:      # costs this try only: another address may do
                    self._context.log_change(
                        logging.ERROR, (address, "fault"),
                        f"{address}: a fault of HAS in trying it: {traceback.format_exc()}")
                    self._context.heard("trouble", address, repr(error), False)
            self._rest()

    def _note_failure(self, address, lost):
        if lost.ours:
            self._context.log_change(
                logging.ERROR, (address, "ours"), f"the heartbeat: {address}: {lost}; this says "
                "nothing of the world: users on open connections play on")
        elif not lost.accepted:                 # nobody listens: the life of that refusal is over
            self._entrance.pause.end()
        if lost.refused and address == self._course.current:
            self._lives.rename()
        event = "trouble" if lost.ours or lost.alive else "unreachable"
        self._context.heard(event, address, str(lost), lost.accepted)

    def consider_moving(self):
        """While users are served: Moved, if another address is to be taken and confirmed."""
        course, settings = self._course, self._context.settings
        address = course.other(settings)
        if not address or not self._book.is_at_hand(address):
            return
        wanted = course.begin_try(settings)
        connection = self.try_beside(address)
        if course.is_to_move(wanted, self._context.settings, connection is not None):
            raise Moved(connection)
        if connection:
            connection.close()

    def try_beside(self, address, old=None):
        """Another connection, no worse than the `old` one; None (logged) if it cannot be had."""
        try:
            connection = self._entrance.establish(address)
            new, before = connection.world, (old or connection).world
            if new.blind and not before.blind or new.looks and not before.looks:
                connection.close()
                raise Lost(f"it looks like a {new.looks}" if new.looks else
                           "the heartbeat's login is not taken any more")
            return connection
        except Exception as error:
            if not isinstance(error, Lost):
                log.exception("%s: a fault of HAS in trying it", address)
            self._say_not_better(address, error)
            return None

    def _say_not_better(self, address, error):
        context, current, wanted = self._context, self._course.current, self._course.wanted
        if address == current:
            context.log_change(
                logging.ERROR, address, f"HUP: the new settings do not work with {address}: "
                f"{error}; the old connection is kept; mend mush_type, mush_ssl or hb_user, then "
                "kill -HUP")
        else:
            context.log_change(
                logging.ERROR if address == wanted else logging.INFO, address,
                f"{address} cannot take over: {error}; users stay on {current}")
        if address in (current, wanted):
            context.tell(context.hub.on_wish, f"{address}: {error}")


class Probes(Survivor):
    """Asks the world whether it lives, and tells the hub."""

    SURVIVES = "silent_since",

    def __init__(self, context, meanwhile):
        self._context = context
        self._meanwhile = meanwhile             # called now and then while the world is silent
        self.asks = []             # (session number, link serial) whose links ended
        self.silent_since = None   # when the probe was sent that is not answered yet

    def probe(self, connection):
        """One probe serves all who asked before it was sent. Lost after dead_after of silence."""
        asks, self.asks = self.asks, []
        try:
            started = self._await_answer(connection)
        except (Lost, Moved):
            self.asks, self.silent_since = asks + self.asks, None
            raise
        self.silent_since = None
        context = self._context
        context.tell(context.hub.on_answers, asks, connection.world.life, context.clock() - started)

    def _await_answer(self, connection):
        """Returns when the probe was sent, or the first one since the world is silent."""
        context, settings = self._context, self._context.settings
        silent, now = self.silent_since is not None, context.clock()
        self.silent_since = started = self.silent_since or now
        answered = connection.question(min(settings.hb_timeout, settings.dead_after))
        while not answered:
            if not silent:
                silent = True
                context.heard("silent")
            dead_after = context.settings.dead_after
            left = started + dead_after - context.clock()
            if left <= 0:
                raise Lost(f"no answer for {dead_after:g} s", dead=True)
            self._meanwhile()
            answered = connection.question(min(left, settings.hb_timeout))
        if silent:
            context.heard("answering")
        return started


class Checks:
    """Passwords to be checked, asked of the world together."""

    def __init__(self, context):
        self._context = context
        self.waiting = collections.deque()      # (session number, link serial, pairs)

    def add(self, number, serial, pairs):
        """Which of these pairs are right? Answered by hub.on_checked."""
        self.waiting.append((number, serial, pairs))

    def _tell(self, number, serial, verdicts):
        self._context.tell(self._context.hub.on_checked, number, serial, verdicts)

    def forget(self):
        """Nobody can say."""
        while self.waiting:
            number, serial, pairs = self.waiting.popleft()
            self._tell(number, serial, [None] * len(pairs))

    def ask(self, connection):
        """Ask about as many waiting pairs as fit into one line."""
        batch, pairs = [], []
        while self.waiting and (not batch or len(pairs) < CHECKS_A_LINE):
            number, serial, asked = self.waiting[0]
            can_ask = connection.can_ask(asked)
            if can_ask and not connection.can_ask(pairs + asked):
                break                           # it begins the next line
            self.waiting.popleft()
            if not can_ask:
                self._tell(number, serial, [None] * len(asked))
                continue
            batch.append((number, serial, len(asked)))
            pairs += asked
        verdicts = connection.verdicts(pairs) if pairs else []
        for number, serial, count in batch:
            self._tell(number, serial, verdicts[:count])
            verdicts = verdicts[count:]


class Heartbeat:
    """The heartbeat's thread: finds a world, stays with it until it is lost, for ever.

    Others may call start(), post to `mailbox`, join(seconds), and then read `parked`; nothing else.
    It has a thread and is none: a Thread's own names change with the Python (3.14: `_context`).
    """

    def __init__(self, hub, hub_mailbox, settings, parked=None, clock=time.monotonic):
        self._thread = threading.Thread(target=self.run, name="heartbeat", daemon=True)
        self._context = context = Context(hub, hub_mailbox, settings, clock)
        self.mailbox = context.mailbox
        self._book = AddressBook(self.mailbox.post, clock)
        self._lives, self._course = Lives(clock), Course(clock)
        self._connector = Connector(context, self._book)
        self._entrance = Entrance(context, self._connector, self._lives)
        self._search = Search(context, self._course, self._entrance, self._book, self._lives,
                              self._rest)
        self._probes = Probes(context, self._search.consider_moving)
        self._checks = Checks(context)
        self._rooms = (self._course, self._entrance, self._entrance.pause, self._lives,
                       self._probes)            # what survives in them is parked together
        self._renew = False        # the settings ask for a new connection to the same world
        self._lacks = False        # the world we are on does not give the heartbeat all it needs
        self._parked_before = parked            # what an older process left
        self.parked = None         # for a new process

    def start(self):
        """Begin. Main thread, once."""
        self._thread.start()

    def join(self, seconds):
        """Wait for the end for at most so long; returns whether it has ended. Main thread."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # ---- messages of the hub, run in this thread

    def on_ask(self, number, serial):
        """A link ended: does the world live?"""
        self._probes.asks.append((number, serial))

    def on_check(self, number, serial, pairs):
        """Which of these pairs are right? Answered by hub.on_checked."""
        self._checks.add(number, serial, pairs)

    _OWN_KEYS = ("mush_type", "hb_user", "hb_pass", "mush_ssl", "mush_ssl_verify", "mush_ssl_ca",
                 "remotehostname_cmd")          # settings that a connection is made with

    def on_settings(self, settings):
        """New settings are in force; a changed list of addresses is a wish to move."""
        context, old = self._context, self._context.settings
        moves = settings.mush_address != old.mush_address
        self._entrance.on_settings(moves or settings.mush_type != old.mush_type)
        if moves:
            self._book.forget_all_but(self._course.current)
        context.said.clear()                    # all is new to the log again
        self._renew = self._renew or self._lacks or any(
            getattr(settings, key) != getattr(old, key) for key in self._OWN_KEYS) or (
            settings.files.get("mush_ssl_ca") != old.files.get("mush_ssl_ca"))
        context.settings = settings
        self._course.on_settings(settings.mush_address[0] if moves else None)
        if moves:
            context.tell(context.hub.on_wish, None)

    def on_down(self):
        """The hub says that the world is down."""
        self._course.on_down()

    def on_stop(self):
        """End the thread; `parked` says how a new process can go on."""
        self._context.stopping = True

    # ---- the thread

    def try_once(self, address):
        """Log in to a world once, without the thread; return its World, or Lost (--probe)."""
        connection = self._entrance.establish(address)
        connection.close()
        return connection.world

    def run(self):
        """The life of the thread."""
        context, rest = self._context, 0
        connection = self._unpark(self._parked_before) if self._parked_before else None
        while not context.stopping:
            try:
                self._pause(rest)
                rest = 0
                connection = connection or self._search.find()
                self._attend(connection)
            except Moved as moved:
                connection.close()
                connection = moved.connection
                continue
            except Lost as lost:
                self._lives.doubt()
                context.heard("lost", str(lost), lost.dead)
            except Stopped:
                self.parked = self._park(connection)
                return
            except Exception:
                log.exception("heartbeat: a fault of HAS; the heartbeat starts anew")
                context.heard("lost", "fault", False)
                rest = FAULT_SECONDS
            if connection:
                connection.close()
            connection = self._parked_before = None
            self._tell_parked(None)
            self._checks.forget()

    def _park(self, connection, leave=True):
        """Leave the connection open for a new process, or a copy of it; plain values."""
        parked = {}
        for room in self._rooms:
            parked.update(room.survivors())
        if connection and connection.talk.ended is None and (
                type(connection.talk.sock) is socket.socket):
            parked["connection"] = connection.park(leave)
        return parked

    def _tell_parked(self, connection):
        """What a new process would need if this one died now."""
        self._context.tell(self._context.hub.on_parked, self._park(connection, leave=False))

    def _unpark(self, parked):
        """Take up what _park() left; return its Connection, if it left one."""
        context = self._context
        for room in self._rooms:
            try:
                room.take_up(parked)
            except Exception as error:          # another version did it otherwise
                log.warning("what the heartbeat knew could not be taken over (%r); it finds out "
                            "anew", error)
        if "connection" not in parked:
            return None
        try:
            connection = Connection.unpark(parked["connection"], context)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            log.warning("the heartbeat's connection could not be taken over (%r); it makes another "
                        "one", error)           # another version did it otherwise
            context.heard("lost", "it could not be taken over", False)
            return None
        self._book.leads(connection.address, connection.world.target)
        self._course.current, self._course.down_since = connection.address, None
        return connection

    def _rest(self):
        """Wait until the next round of tries."""
        self._pause(self._course.pace(self._context.settings, self._connector.round_trip))

    def _pause(self, seconds):
        """Wait; cut short when a link ends, for then somebody wants to know."""
        context, asks = self._context, len(self._probes.asks)
        until = context.clock() + seconds
        while context.clock() < until and (
                len(self._probes.asks) <= asks or self._course.down_since is not None):
            context.wait(until)

    def _attend(self, connection):
        """Probe, answer, check, until the connection is lost or another address is confirmed."""
        context = self._context
        self._course.arrive(connection.address)
        self._lives.enter(connection.world.life)
        self._lacks = connection.lacks_something
        if self._parked_before:                 # an older process found it: does it still answer?
            self._parked_before = None
            self._probes.probe(connection)
        self._tell_parked(connection)
        context.tell(context.hub.on_world_found, connection.world)
        beat_at = context.clock() + context.settings.beat
        while True:
            if connection.talk.ended is not None:
                raise Lost(connection.talk.ended)
            self._search.consider_moving()
            self._renew_where_due(connection)
            if self._probes.asks or context.clock() >= beat_at:
                self._probes.probe(connection)
                beat_at = context.clock() + context.settings.beat
            elif self._checks.waiting and connection.quota.spare() > PROBE_RESERVE:
                self._checks.ask(connection)
            else:
                soon = self._checks.waiting or self._course.wanted or connection.renew_at
                context.wait(min(beat_at, context.clock() + LOOK_SECONDS) if soon else beat_at)

    def _renew_where_due(self, connection):
        """Moved to another connection to this world, if settings or its login screen want one."""
        if self._renew:
            self._renew = False                 # before: a HUP may come in the middle of it
            better = self._search.try_beside(connection.address, connection)
            if better:
                raise Moved(better)
        due = connection.renew_at and min(connection.renew_at, self._entrance.pause.login_after)
        if due is None or self._context.clock() < due:
            return
        try:
            raise Moved(self._entrance.establish(connection.address))
        except Lost as lost:
            if not lost.ours:
                raise
            self._context.log_change(
                logging.ERROR, (connection.address, "ours"),
                f"the heartbeat: {lost}; tried again in {RENEW_AGAIN_SECONDS} s")
            connection.renew_at = self._context.clock() + RENEW_AGAIN_SECONDS
            pause = self._entrance.pause
            pause.login_after = max(pause.login_after, connection.renew_at)


# ======================================================================
# 8. Health
#
# What is known of the world, from what was heard of it. Pure: no socket, no
# clock, no log. Events go in, what is to be done about them comes out.
# ======================================================================

# A host that has died sends no end of its links: connects refused for so long say it, too.
AWAY_SECONDS = 3
# The heartbeat and every link have ended: time for its first tries (FASTEST_RETRY) to say why.
ALL_GONE_SECONDS = 0.3
# The heartbeat counts the same silence, and knows more of it: it gives up first, where it can.
SILENCE_GRACE_SECONDS = 1
# A link that outlives a new heartbeat connection for so long is in the same world.
ADOPT_SECONDS = 5
# Links that end this close together are no ordinary leaving; until the second probe for them.
ENDINGS_SECONDS, ASK_AGAIN_SECONDS = 1, 0.5


class Condition(enum.Enum):
    """How the world is; the names are packed, the values shown to admins."""

    STARTING = "not found yet"
    UP = "up"
    SILENT = "silent"
    DOWN = "down"


class Loss:
    """The heartbeat has lost its connection: does that mean that the world is down? Pure.

    Alone it does not: it may have been booted, or this machine may have trouble of its own
    (look-ups, descriptors, TLS). Connects that are refused, or taken and then answered with
    nothing at all, say something, and links that end; a world that hangs up on the heartbeat, or
    shows it a banner, lives.
    """

    def __init__(self, since):
        self.since = since
        self.refused_since = None               # since when connects are refused
        self.mute_since = None                  # ... are taken, and nothing comes

    def tried(self, accepted, now):
        """A try to get back was refused or not answered, or (`accepted`) taken and not answered."""
        if accepted:
            self.mute_since, self.refused_since = self.mute_since or now, None
        else:
            self.refused_since = self.refused_since or now

    def heard(self):
        """The world gave a sign of life."""
        self.refused_since = self.mute_since = None

    def wait(self, now, asking, linked, dead_after):
        """Seconds until it is down if nothing else happens: 0 is now, None never.

        `asking`: a link has ended for a reason that is not known; `linked`: another is open.
        """
        if self.refused_since is not None:
            at = self.refused_since + (0 if asking or not linked else AWAY_SECONDS)
        elif self.mute_since is not None:
            at = self.mute_since + (dead_after if linked else 0)
        elif asking and not linked:             # every link has ended, and no try has had its time
            at = self.since + ALL_GONE_SECONDS
        else:
            return None
        return max(0, at - now)


class Tally(collections.Counter):
    """How many there are of each; nothing is kept of what there is none of."""

    def take(self, key):
        """There is one less."""
        self[key] -= 1
        if not self[key]:
            del self[key]


class Endings:
    """Which links have ended for a reason not known yet, and which of them need a second probe
    before it is said that their users left (rule 2). Pure.

    Links of several characters that end within a second are no ordinary leaving: a world that dies
    may close its users one by one, and answer probes meanwhile.
    """

    def __init__(self):
        self.asking = {}                        # session number -> (link serial, life of the link)
        self._lately = collections.deque()      # (when, session number, who)
        self._names = Tally()      # who -> how often he is in it
        self._doubted = {}                      # session number -> which heartbeat connection
        #                                         has answered already, or None

    def ended(self, number, serial, life, who, now):
        """The world has ended a link of `who`, who has not said QUIT."""
        self.asking[number] = serial, life
        while self._lately and now - self._lately[0][0] > ENDINGS_SECONDS:
            self._names.take(self._lately.popleft()[2])
        self._doubted.pop(number, None)
        if len(self._names) > (who in self._names):         # others, too
            if len(self._names) == 1:           # else they are doubted already
                for _, other, _ in self._lately:
                    self._doubted.setdefault(other)
            self._doubted[number] = None
        self._lately.append((now, number, who))
        self._names[who] += 1

    def is_asking(self, number, serial):
        """Whether it is still not known why that link has ended."""
        return self.asking.get(number, (None,))[0] == serial

    def needs_another(self, number, connection):
        """Whether the answer that came over this heartbeat connection is not yet enough."""
        if number not in self._doubted or self._doubted[number] == connection:
            return False
        self._doubted[number] = connection
        return True

    def forget(self, number):
        """That session has ended."""
        self.asking.pop(number, None)
        self._doubted.pop(number, None)


class Health(Survivor):
    """What is known of the world (rule 2 and World health in the design). Pure.

    Each method that takes `now` is an event. It returns what is to be done about it in this
    order, as tuples of a name and arguments; the hub has a method _do_NAME for each:

        say LEVEL TEXT               a line for the log
        later SECONDS EVENT ...      have that event happen then
        ask NUMBER SERIAL            have the heartbeat ask why this session's link has ended
        verdict NUMBER SERIAL LEFT   its user left (True), or the world died (False)
        became WAS AGO               the condition is another, since so many seconds
        silence SILENT               the world answers no more, or again
        down REASON DIED             it is down, or no more, since DIED: hold the users
        found LIVED_ON RENEWED       a world was confirmed: in the life users know; without news
        moved OLD, reborn DIED       ... another one; the same in another life, since DIED
        up NEW_LIFE                  ... users may go (back) to it
        adopt LIFE                   open links are in that life
    """

    SURVIVES = "silent_until", "answered_at"

    def __init__(self, settings, linked):
        self.settings = settings                # hb_timeout, dead_after, retry; another after HUP
        self._linked = linked                   # () -> whether a link to the world is open
        self.condition = Condition.STARTING
        self.world = None                       # the World users are on, if one was found
        self.loss = None                        # a Loss, while the heartbeat has no connection
        self.lost_at = None                     # when users lost the world, if they did
        self.silent_until = 0.0                 # when a silent world is given up
        self.answered_at = 0.0                  # when it answered a probe last
        self.reasons = {}                       # Address -> why not reached, since it was found
        self.endings = Endings()
        self._connections = 0                   # of the heartbeat, that were confirmed
        self._judging = False                   # judge() comes at the end of this turn

    @property
    def is_up(self):
        """Whether links may be opened."""
        return self.condition in (Condition.UP, Condition.SILENT)

    # ---- users' links

    def ended(self, number, serial, life, who, now):
        """The world has ended a session's link, and it is not known why."""
        self.endings.ended(number, serial, life, who, now)
        effects = [("ask", number, serial)]
        if self.loss:
            effects.append(("later", AWAY_SECONDS, "unanswered", number, serial))
            if not self._judging:               # once for all that end now: it looks at each link
                self._judging = True
                effects.append(("later", 0, "judge"))
        return effects

    def answered(self, asks, life, now):
        """The world, in that life, answered a probe sent behind these (session, serial)."""
        self.answered_at, effects = now, []
        for number, serial in asks:
            if not self.endings.is_asking(number, serial):
                continue
            left = self.endings.asking[number][1] == life
            if left and self.endings.needs_another(number, self._connections):
                effects.append(("later", ASK_AGAIN_SECONDS, "doubted", number, serial))
            else:
                effects += self._verdict(number, serial, left)
        return effects

    def doubted(self, number, serial, now):
        """One answer was not enough, and the time for another question has come."""
        return [("ask", number, serial)] if self.endings.is_asking(number, serial) else []

    def unanswered(self, number, serial, now):
        """Nobody can say why this link has ended, for the heartbeat is away: its user is kept."""
        if self.loss and self.is_up and self.endings.is_asking(number, serial):
            return self._verdict(number, serial, False)
        return []

    def _verdict(self, number, serial, left):
        del self.endings.asking[number]
        return [("verdict", number, serial, left)]

    # ---- the heartbeat

    def lost(self, reason, dead, now):
        """The heartbeat's connection has ended; `dead`: the world was silent for too long."""
        if self.condition is Condition.DOWN:
            return []
        effects = [("say", logging.INFO, f"the heartbeat lost its connection: {reason}")]
        if dead:
            return effects + self._down(reason, now)
        self.loss = Loss(now)
        self.lost_at = now if self.lost_at is None else self.lost_at
        effects += [("later", AWAY_SECONDS, "unanswered", number, serial)
                    for number, (serial, _) in self.endings.asking.items()]
        return effects + self.judge(now)

    def unreachable(self, address, reason, accepted, now):
        """The heartbeat could not get (back) to a world, even if that took the connection."""
        effects = []
        if reason != self.reasons.get(address):
            effects = [("say", logging.INFO, f"the world at {address} cannot be reached: {reason}; "
                        f"trying on every {self.settings.retry:g} s")]
        self.reasons[address] = reason
        if self.condition is Condition.STARTING:
            return effects + self._down(reason, now)
        if self.loss and address == self.world.address:
            self.loss.tried(accepted, now)
            return effects + self.judge(now)
        return effects

    def trouble(self, address, reason, accepted, now):
        """The heartbeat could not try to get to a world, for a reason that says nothing of it."""
        if self.condition is Condition.STARTING:    # nobody is in it: newcomers must be told
            return self.unreachable(address, reason, accepted, now)
        self.reasons.setdefault(address, reason)
        if accepted and self.loss and address == self.world.address:
            self.loss.heard()
        return []

    def judge(self, now):
        """Does a lost heartbeat mean that the world is down?"""
        self._judging = False
        if self.loss is None or not self.is_up:
            return []
        wait = self.loss.wait(now, bool(self.endings.asking), self._linked(),
                              self.settings.dead_after)
        if wait == 0:
            reason = self.reasons.get(self.world.address, "the heartbeat cannot get back")
            return self._down(reason, now)
        return [] if wait is None else [("later", wait, "judge")]

    def _down(self, reason, now):
        died = self._died_at(now)
        effects = self._become(Condition.DOWN, 0 if self.lost_at is None else now - self.lost_at)
        self.loss = self.lost_at = None
        self.endings.asking.clear()
        return effects + [("down", reason, died)]

    def _died_at(self, now):
        """When the world died. One who froze it did so before a probe was first not answered."""
        frozen = self.settings.dead_after if self.condition is Condition.SILENT else 0
        return self.loss.since if self.loss else now - frozen

    def _become(self, condition, ago=0):
        was, self.condition = self.condition, condition
        return [("became", was, ago)] if was is not condition else []

    # ---- silence

    def silent(self, now):
        """A probe was not answered in time."""
        if self.condition is not Condition.UP:
            return []
        dead_after, hb_timeout = self.settings.dead_after, self.settings.hb_timeout
        self.lost_at = now - hb_timeout
        self.silent_until = now + max(0.0, dead_after - hb_timeout) + SILENCE_GRACE_SECONDS
        return [("say", logging.WARNING, "the world does not answer; users stay connected; "
                 f"down after {dead_after:g} s")] + self._become(Condition.SILENT) + self.go_on(now)

    def go_on(self, now):
        """What is to be done while it is silent, or its life not known: in a new process again."""
        if self.condition is not Condition.SILENT:
            return self._adopt_later()
        return [("later", max(0.0, self.silent_until - now), "give_up"), ("silence", True)]

    def give_up(self, now):
        """The world is silent: for too long? The heartbeat may have been lost meanwhile."""
        if self.condition is Condition.SILENT and now >= self.silent_until:
            return self._down(f"no answer for {self.settings.dead_after:g} s", now)
        return []

    def answering(self, now):
        """The world answers again."""
        if self.condition is not Condition.SILENT:
            return []
        self.lost_at = None
        return [("say", logging.WARNING, "the world answers again"),
                *self._become(Condition.UP), ("silence", False)]

    # ---- a world

    def found(self, world, now):
        """The heartbeat confirmed a world: the one users are on, or another to which all move."""
        old, was_up, was_silent = self.world, self.is_up, self.condition is Condition.SILENT
        lived_on = bool(old) and old.life == world.life and was_up
        moved = old and old.address != world.address
        # a life that begins with "?" is not known: it may be the same
        reborn = (old and not moved and "?" not in old.life + world.life
                  and old.life != world.life)
        effects = [("found", lived_on, world == old and was_up and self.loss is None)]
        if moved:
            effects.append(("moved", old))
        elif reborn and was_up:
            effects.append(("reborn", self._died_at(now)))
        if moved or reborn and was_up:
            self.endings.asking.clear()         # they wait for it now, like all others
        self.world, self.loss, self.lost_at, self.reasons = world, None, None, {}
        self.answered_at = now
        self._connections += 1
        effects += self._become(Condition.UP)
        if was_silent:
            effects.append(("silence", False))
        return effects + self._adopt_later() + [("up", bool(moved or reborn or not was_up))]

    def _adopt_later(self):
        is_unknown = self.condition is Condition.UP and self.world.life.startswith("?")
        return [("later", ADOPT_SECONDS, "adopted", self.world.life)] if is_unknown else []

    def adopted(self, life, now):
        """Links that are still open so long after the heartbeat's are in the same life as it."""
        is_same = self.world.life == life and self.condition is Condition.UP
        return [("adopt", life)] if is_same else []


class Record(Survivor):
    """How the world has been, for admins. Times are of the wall clock: they outlive us."""

    SURVIVES = ("started", "health_since", "last_outage", "outages", "outage_seconds", "round_trip",
                "takeovers", "fell_back", "bytes_in", "bytes_out")

    def __init__(self):
        self.started = self.health_since = self.last_outage = time.time()
        self.outages, self.outage_seconds = 0, 0.0
        self.round_trip = None                  # seconds, of the last answered probe
        self.bytes_in = self.bytes_out = 0      # of sessions that have ended
        self.takeovers = 0                      # processes that have taken over since the start
        self.fell_back = False                  # to the program of before, for another has failed
        self.wish = None                        # what the settings ask for in vain: "address: why"

    def became(self, was, condition, ago):
        """The world is another way since `ago` seconds: an outage lasts since users lost it."""
        now = time.time()
        if was is Condition.DOWN:
            self.outage_seconds = self.lost_seconds(was)
        if condition is Condition.DOWN and was is not Condition.STARTING:
            self.outages, self.last_outage = self.outages + 1, now
        self.health_since = now - ago

    def reborn(self, seconds):
        """It was down for so long, and is back before that was seen."""
        self.outages, self.last_outage = self.outages + 1, time.time()
        self.outage_seconds += seconds

    def taken_over(self, fell_back):
        """A new process goes on with this."""
        self.takeovers, self.fell_back = self.takeovers + 1, fell_back

    def lost_seconds(self, condition):
        """Seconds of all outages; before the first world was found it was none."""
        lasting = condition is Condition.DOWN and self.outages
        return self.outage_seconds + (time.time() - self.health_since if lasting else 0)


class History(Survivor):
    """The last outages, and what became of the users who were in the game, for admins."""

    SURVIVES = "history_text", "returns", "failures"
    MOST, MOST_NAMES = 50, 50

    def __init__(self):
        self._text = None                       # see history_text
        # oldest first: {"at": when it began, "seconds": how long it lasted (None: it does still),
        # "why": text, "users": how many, "back": how many of them are, "back_after": seconds from
        # its end to the last of these, "absent": [[name, why], ...] of others}
        self.past_outages = []
        self.missing = {}                       # session number -> name: of the last one, not back
        self.returns = self.failures = 0        # logins repeated since the start; refused ones

    @property
    def history_text(self):
        """All of it as one text: thousands of names are packed at once, only when there is news."""
        if self._text is None:
            self._text = json.dumps([self.past_outages, list(self.missing.items())])
        return self._text

    @history_text.setter
    def history_text(self, text):
        self.past_outages, missing = json.loads(text)
        self.missing, self._text = dict(missing), text

    def lost(self, at, why, names):
        """Users have lost the world: {session number: name}."""
        for number in list(self.missing):
            self.gone(number, "the world went down again")
        self._text = None
        self.past_outages = self.past_outages[1 - self.MOST:] + [{
            "at": at, "seconds": None, "why": why, "users": len(names), "back": 0, "back_after": 0,
            "absent": []}]
        self.missing = names

    @property
    def is_open(self):
        """Whether the last outage lasts still."""
        return bool(self.past_outages) and self.past_outages[-1]["seconds"] is None

    def found(self):
        """The world is there again."""
        if self.is_open:
            self._text = None
            self.past_outages[-1]["seconds"] = time.time() - self.past_outages[-1]["at"]

    def returned(self, number):
        """That session is in the game again."""
        self.returns += 1
        if self.missing.pop(number, None) is not None:
            self._text = None
            outage = self.past_outages[-1]
            outage["back"] += 1
            outage["back_after"] = time.time() - outage["at"] - (outage["seconds"] or 0)

    def refused(self, number, why):
        """It is not: its login did not take."""
        self.failures += 1
        self.gone(number, why)

    def gone(self, number, why):
        """Nothing more is to be expected of that session."""
        name = self.missing.pop(number, None)
        if name is None:
            return
        self._text, absent = None, self.past_outages[-1]["absent"]
        if len(absent) < self.MOST_NAMES:
            absent.append([name, why])

    def told(self):
        """For admins, as plain values."""
        return {"outages": self.past_outages, "waiting": list(self.missing.values())}


# ======================================================================
# 9. Hub
#
# The main loop and its rooms, all in the main thread: who is let in (Door),
# whose typed login must wait (LoginQueue), who may connect to the world and
# when (Links), what admins ask (Control), new settings (Reload).
# ======================================================================

NOISE_SECONDS = 5                  # arrival lines of users HAS brings back are hidden for this long
SILENT_LINK_SECONDS = 0.05         # a link that shows nothing for so long holds up the next no more
WAKE_SECONDS = 0.3, 2, 2           # ... may not have been accepted: then the world is woken
GOODBYE_SECONDS, FLUSHED_SECONDS = 3, 0.1      # to send the goodbyes; between looks who has his
PATIENCE = 14                      # line ends, and as many kilobytes, read with care in one turn
BREATH_SECONDS = 0.001             # for others, between two such parts of what came at once
NOBODY = 0                         # the number of no session
PROBE_SECONDS = 1                  # who leaves sooner without a word was a front's health check
ACCEPTS_A_TURN = LINKS_A_TURN = 8  # newcomers cost most: those who play have their turn between
EVENTS_A_TURN = 1000
BURDEN_A_TURN = 150                # 1: a stream that ends, for at a crash of the world thousands do
                                   # at once; 2: one is back in the game, or otherwise written down;
                                   # 10: what a world said was read with care; who plays goes first
FORGOTTEN_SECONDS = 120            # when all timers of a session that has ended have run out
RECORDS_A_TURN, RECORDS_MEANWHILE = 25, 5      # written down; the latter while others wait
UNTIDY = 100                       # sessions that change leave new objects, for Python to look at
SWEEP_SECONDS = 0.01               # of calls for everybody, and of timers, in one turn


def users(count):
    """A number of users in words."""
    return f"{count} user{'' if count == 1 else 's'}"


def lies_in(host, networks):
    """Whether an address belongs to one of these networks."""
    return bool(networks) and any(ipaddress.ip_address(host) in network for network in networks)


def host_group(host):
    """What counts as one address: of IPv6 a /64, for a whole one belongs to one household."""
    return str(ipaddress.ip_network(host + "/64", strict=False)) if ":" in host else host


class Gone:
    """Stands for a stream that has left the selector since it was said to be ready."""

    def ready(self, events):
        """That is of no use any more."""


GONE = Gone()


class Poller(selectors.DefaultSelector):
    """The selector of a loop. What it says of who is ready is [(descriptor, events)]; `streams` has
    who that is, and meaning() tells what other events than READ are. Where there is epoll it names
    at most EVENTS_A_TURN, those who have waited longest."""

    def __init__(self):
        super().__init__()
        self.streams, self._epoll = [], None    # by descriptor; a list is asked in half the time
        self._changes = {}         # what is to stand there from the next select() on
        if isinstance(self, getattr(selectors, "EpollSelector", ())):
            self._epoll = select.epoll.fromfd(os.dup(self.fileno()))

    def register(self, sock, events, stream=None):
        """Watch this socket, for a stream."""
        key = super().register(sock, events, stream)
        self.streams += [GONE] * (key.fd + 1 - len(self.streams))
        (self._changes if key.fd in self._changes else self.streams)[key.fd] = stream
        return key

    def unregister(self, sock):
        """Watch it no more. Who has its descriptor next is not meant by what was said of this."""
        key = super().unregister(sock)
        self.streams[key.fd] = self._changes[key.fd] = GONE
        return key

    def select(self, timeout=None):
        """Wait for at most `timeout` seconds; None: for ever."""
        for fd, stream in self._changes.items():
            self.streams[fd] = stream
        self._changes.clear()
        if not self._epoll:
            return [(key.fd, events) for key, events in super().select(timeout)]
        return self._epoll.poll(timeout, EVENTS_A_TURN)

    def meaning(self, fd, events):
        """What it said, as READ and WRITE. An error or a hang-up is for who reads as well as for
        who writes."""
        if not self._epoll:
            return events
        wanted = 0 if self.streams[fd] is GONE else self.get_map()[fd].events
        return wanted & ((READ if events & ~select.EPOLLOUT else 0)
                         | (WRITE if events & ~select.EPOLLIN else 0))

    def close(self):
        """Watch nobody any more."""
        if self._epoll:
            self._epoll.close()
        super().close()


class Loop:
    """Serves what is ready and what is due. Main thread only, but for `mailbox`.

    What stands in the selector has ready(events) and owner; an owner with on_error() ends alone
    when its handler fails.
    """

    def __init__(self, clock=time.monotonic):
        self.clock, self.now = clock, clock()   # now: of this turn
        self.selector = Poller()
        self.mailbox, self.owner = Mailbox(), self          # it is served like a stream
        self.selector.register(self.mailbox.reader, READ, self)
        self._timers, self._timer_numbers = [], itertools.count()
        self.patience = PATIENCE                # what may still be read with care in this turn
        self.backlogs = collections.deque()     # sessions with more to be read
        self._breath_over = 0                   # ... and from when on that is done
        self.changed = set()                    # sessions, or the hub: perhaps, in this turn
        self.burden = 0                         # of this turn: see BURDEN_A_TURN
        self._left = frozenset()                # descriptors that were ready, and not served
        self._sweeps = collections.deque()      # see sweep()

    def turn(self, longest=None):
        """Serve what is ready and what is due; wait for it at most `longest` seconds."""
        self.patience, self.burden = PATIENCE, 0
        timers, left = self._timers, len(self.backlogs)
        if left:
            longest = BREATH_SECONDS
        if self.changed:
            longest = 0
        elif timers:                # counted from the last look at the clock: late by a turn's work
            due = max(0.0, timers[0][0] - self.now)
            longest = due if longest is None else min(due, longest)
        ready = self.selector.select(longest)
        self.now = self.clock()
        many = self._left or len(ready) > BURDEN_A_TURN
        self._serve(self._in_order(ready) if many else ready)
        if timers and timers[0][0] <= self.now:
            self._run_timers()
        if left and (not ready or self.now >= self._breath_over):
            self._read_on(left)
        if self.changed:
            self.write_down()

    def _serve(self, ready):
        """Serve who is ready, until that was too much for a turn; the selector names the others
        again."""
        streams, rest, self._left = self.selector.streams, iter(ready), frozenset()
        for fd, events in rest:
            stream = streams[fd]
            if events != READ:                  # epoll has the same number for that
                events = self.selector.meaning(fd, events)
            try:
                stream.ready(events)
            except Exception:
                self.fault(stream.owner)
            if self.burden >= BURDEN_A_TURN:
                self._left = frozenset(fd for fd, _ in rest)
                break

    def _read_on(self, left):
        """Read more of the first `left` that were left for later: not in every turn, or one flood
        would have this process busy all the time."""
        while left and self.patience > 0:
            session, left = self.backlogs.popleft(), left - 1
            self.safely(session.inbox.take_turn)
        self._breath_over = self.now + BREATH_SECONDS

    def write_down(self):
        """At the end of a turn, what has `changed` in it."""
        self.changed.clear()

    def ready(self, events):
        """Something was posted to the mailbox."""
        self.mailbox.run()

    def later(self, seconds, call, *arguments):
        """Have `call(*arguments)` run after `seconds`."""
        due = self.now + seconds
        heapq.heappush(self._timers, (due, next(self._timer_numbers), call, arguments))

    def _run_timers(self):
        newest = next(self._timer_numbers)      # what is set from now on is for the next turn
        until = self.clock() + SWEEP_SECONDS
        while self._timers and self._timers[0][0] <= self.now and self._timers[0][1] < newest:
            _, _, call, arguments = heapq.heappop(self._timers)
            self.safely(call, *arguments)
            if self.clock() >= until:
                break                           # due as they are, they come in the next turn

    def _in_order(self, ready):
        """One who was not left then for one who was: nobody waits for all of them. First of all
        what the heartbeat says: it may make all those ends one."""
        self.mailbox.run()
        left = [it for it in ready if it[0] in self._left] if self._left else []
        if left:
            fresh = [it for it in ready if it[0] not in self._left]
            ready = [it for pair in itertools.zip_longest(fresh, left) for it in pair if it]
        return ready

    def sweep(self, calls):
        """Make many calls, an iterable of (call, arguments), in order and behind those of other
        sweeps: at once, as far as the time of a turn goes, then in the next turns."""
        self._sweeps.append(iter(calls))
        if len(self._sweeps) == 1 and not self._sweep_on():         # else they are being made
            self.later(0, self.later, 0, self._go_on_sweeping)      # not by this turn's timers

    def _go_on_sweeping(self):
        if not self._sweep_on():
            self.later(0, self._go_on_sweeping)

    def _sweep_on(self):
        """Make calls for the time of a turn; whether all are made."""
        until = self.clock() + SWEEP_SECONDS
        while self._sweeps:
            for call, arguments in self._sweeps[0]:
                self.safely(call, *arguments)
                if self.clock() >= until:
                    return False
            self._sweeps.popleft()
        return True

    def safely(self, call, *arguments):
        """Call it; an exception ends the client it was for, nothing else."""
        try:
            call(*arguments)
        except Exception:
            self.fault(getattr(call, "__self__", self))

    def fault(self, owner):
        """An exception (the one being handled) ends its owner: of a stream that, of a room of a
        session the session; one of the hub goes on up."""
        owner = getattr(owner, "owner", owner)
        owner = getattr(owner, "session", owner)
        if not hasattr(owner, "on_error"):
            raise
        log.exception("%s: a fault of HAS; this client is closed", owner)
        owner.on_error()


class QuietLog:
    """What strangers cause is logged once a minute for each address; the others are counted."""

    MINUTE, MOST = 60, 100         # so many addresses and reasons at a time; the others in one sum

    def __init__(self, later, most=MOST):
        self._later, self._most = later, most   # Loop.later
        self._counts, self._others, self._told = {}, 0, set()

    def note(self, host, what, line="", free=1, level=logging.INFO):
        """Log `line`, or what a client from `host` did, the first `free` times of a minute. Returns
        whether it was logged."""
        key = host_group(host), what
        if not (self._counts or self._others):
            self._later(self.MINUTE, self._sum_up)
        if key not in self._counts and len(self._counts) >= self._most:
            self._others += 1
            return False
        self._counts[key] = self._counts.get(key, -free) + 1
        if self._counts[key] <= 0:
            log.log(level, "%s", line or f"client from {host} {what}")
        return self._counts[key] <= 0

    def once(self, host, what):
        """Warn of what a client from `host` did, for each address once and for all."""
        if host_group(host) not in self._told and len(self._told) < self.MOST:
            self._told.add(host_group(host))
            log.warning("client from %s %s", host, what)

    def _sum_up(self):
        counts, others, self._counts, self._others = self._counts, self._others, {}, 0
        for (host, what), count in counts.items():
            if count > 0:
                log.info("clients from %s %s: %d more in the last minute", host, what, count)
        if others:
            log.info("%d more such lines in the last minute, about other addresses", others)


# ---- who is let in

def open_listeners(address, port):
    """Listening sockets for an address ("" is all, IPv4 and IPv6) and port; OSError if none."""
    found, failure = [], None
    for host in [address] if address else ["0.0.0.0", "::"]:
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if ":" in host and hasattr(socket, "IPV6_V6ONLY"):
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((host, found[0].getsockname()[1] if found else port))
                sock.listen(1024)
            except OSError:
                sock.close()
                raise
            found.append(sock)
        except OSError as error:
            failure = error
    if not found or failure and failure.errno == errno.EADDRINUSE:
        for sock in found:
            sock.close()
        raise failure
    return found


def cannot_listen(error, address, port, tls):
    """`error` of open_listeners with the place and the remedy in its text."""
    remedy = {errno.EADDRINUSE: "another program has this port: see `ss -ltnp`",
              errno.EACCES: "ports below 1024 are root's: take a higher one, or give python3 "
              "CAP_NET_BIND_SERVICE",
              errno.EADDRNOTAVAIL: "this machine has no such address: mend local_address"}
    remedy = remedy.get(error.errno)
    return OSError(error.errno, error.strerror + (f": {remedy}" if remedy else ""),
                   f"{address or 'all addresses'}, {'local_port_ssl' if tls else 'local_port'} "
                   f"{port}")


class Listener:
    """A listening socket in the hub's selector."""

    PAUSE_SECONDS = 1              # when no descriptor is left, or the loop would spin on it
    closed = False

    def __init__(self, hub, sock, tls, wanted):
        self.hub, self.sock, self.owner, self.tls = hub, sock, self, tls
        self.wanted = wanted                    # (local_address, port, tls) as the settings say
        sock.setblocking(False)
        hub.selector.register(sock, READ, self)

    def __str__(self):
        host, port = self.sock.getsockname()[:2]
        return (f"[{host}]" if ":" in host else host) + f":{port}" + (" (TLS)" if self.tls else "")

    def ready(self, events):
        """Accept some that wait; the others in the next turns."""
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, peer = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept clients: %s; next try in %d s; raise the limit "
                          "(ulimit -n)", error.strerror, self.PAUSE_SECONDS)
                self.hub.selector.unregister(self.sock)     # or the loop would spin on it
                self.hub.later(self.PAUSE_SECONDS, self._again)
                return
            try:
                self.on_accepted(sock, peer)
            except (OSError, ValueError) as error:
                log.info("a client was gone before it was let in: %s", error)
                self._put_out(sock)
            except Exception:
                log.exception("a fault of HAS in letting a client in; it is closed")
                self._put_out(sock)

    def _put_out(self, sock):
        """Close a socket that was not let in, wherever that ended."""
        try:
            self.hub.door.put_out(self.hub.selector.get_key(sock).data)
        except (KeyError, ValueError):
            hang_up(sock)                       # no stream was made of it yet

    def on_accepted(self, sock, peer):
        """A client."""
        if not self.tls:
            self.hub.catch(sock)                # at once: as far as he knows he is connected
        self.hub.door.on_accept(sock, str(address_of(peer[0])), self.tls)

    def _again(self):
        if not self.closed and self.sock not in self.hub.selector.get_map():
            self.hub.selector.register(self.sock, READ, self)

    def close(self):
        self.closed = True
        self._unregister()
        hang_up(self.sock)

    def _unregister(self):
        with contextlib.suppress(KeyError):     # paused
            self.hub.selector.unregister(self.sock)


class Lobby:
    """Connections that are no sessions: a few for each port, none for long, the oldest make room.

    So whoever fills it with silence keeps nobody out who speaks. Members have port, host, overdue()
    and turn_away(why).
    """

    LOOK_SECONDS = 0.2
    NO_ROOM = "made room for newer ones before it was let in"

    def __init__(self, hub):
        self.hub = hub
        self._ports = {}                        # port -> {member: when overdue}, oldest first
        self._hosts = Tally()      # (port, address or /64) -> members

    def __len__(self):
        return sum(map(len, self._ports.values()))

    def __contains__(self, member):
        return member in self._ports.get(member.port, ())

    def add(self, member, seconds, most, most_of_host=0):
        """Take one in, for so long; never more than `most` at its port (of_host 0: no limit)."""
        if not len(self):
            self.hub.later(self.LOOK_SECONDS, self._look)
        here, key = self._ports.setdefault(member.port, {}), self._key(member)
        if most_of_host and self._hosts[key] >= most_of_host:
            next(it for it in here if self._key(it) == key).turn_away(self.NO_ROOM)
        elif len(here) >= most:
            next(iter(here)).turn_away(self.NO_ROOM)
        here[member] = self.hub.now + seconds
        self._hosts[key] += 1

    def discard(self, member):
        """It is a session now, or has gone. Harmless twice."""
        if self._ports.get(member.port, {}).pop(member, None) is not None:
            self._hosts.take(self._key(member))

    @staticmethod
    def _key(member):
        return member.port, host_group(member.host)

    def _look(self):
        """End the time of those who are overdue; they come first."""
        for here in self._ports.values():
            for member, due in here.items():
                if due <= self.hub.now:
                    self.hub.later(0, member.overdue)
        if len(self):
            self.hub.later(self.LOOK_SECONDS, self._look)


Header = collections.namedtuple("Header", "size host")
Header.__doc__ = """What was read of a PROXY header: its size, 0 for none, and the client's address,
None for the front's own."""
PROXY_1, PROXY_2 = b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n"
_PROXY_LINE = re.compile(rb"PROXY (?:TCP[46] ([0-9A-Fa-f.:]+) [0-9A-Fa-f.:]+ \d{1,5} \d{1,5}"
                         rb"|UNKNOWN(?: .*)?)", re.S)


def read_proxy_header(head):
    """The PROXY header (HAProxy's proxy-protocol.txt, versions 1 and 2) that `head` begins with.

    None while more must come; ValueError if it is broken: then the front is not to be served
    (2.1, 2.2).
    """
    if head.startswith(PROXY_1):
        return _proxy_line(head)
    if head.startswith(PROXY_2):
        return _proxy_block(head)
    return None if PROXY_1.startswith(head) or PROXY_2.startswith(head) else Header(0, None)


def _proxy_line(head):
    end = head.find(b"\r\n", 0, 107)           # the longest there is
    if end < 0 and len(head) < 107 and b"\n" not in head:
        return None
    match = _PROXY_LINE.fullmatch(head, 0, max(end, 0))
    if not match:
        raise ValueError("no such line in version 1")
    host = match.group(1)
    return Header(end + 2, host and str(address_of(host.decode())))


def _proxy_block(head):
    if len(head) < 16:
        return None
    version, family, length = struct.unpack(">BBH", head[12:16])
    if version not in (0x20, 0x21) or family > 0x32 or family & 15 > 2:
        raise ValueError("no such command or family in version 2")
    if len(head) < 16 + length:
        return None
    width = {1: 4, 2: 16}.get(family >> 4, 0)   # a unix socket or nothing: no address
    if version == 0x20 or not width:            # LOCAL: the front's own, its health check
        return Header(16 + length, None)
    if length < 2 * width + 4:
        raise ValueError("too short for its addresses")
    return Header(16 + length, str(address_of(str(ipaddress.ip_address(head[16:16 + width])))))


class Arrival(Lone):
    """A client that is no session yet: a front's PROXY header is awaited."""

    port = "PROXY"
    SECONDS = 10                   # for a header that has begun
    NO_HEADER_SECONDS = 1          # a front silent for so long has a client of its own, or none

    def __init__(self, hub, sock, host):
        self.hub, self.host, self.head, self.since = hub, host, b"", hub.now
        self.stream = Stream(hub.selector, sock, self, self.on_data)

    def on_stream_end(self, stream, reason):
        """It ended before it was a session."""
        self.turn_away(f"left before it was let in{f': {reason}' if reason else ''}")

    def on_data(self, data):
        """Bytes that should be a PROXY header."""
        self.head += data
        try:
            header = read_proxy_header(self.head)
        except ValueError as error:
            self.turn_away(f"sent a broken PROXY header: {error}")
            return
        # a header of the front's own with nothing behind it: most often its health check: overdue()
        if header and (header.host or header.size < len(self.head)):
            self._let_in(header)

    def overdue(self):
        """Nothing more came for a while."""
        if self not in self.hub.door.arrivals:
            return
        header = read_proxy_header(self.head)
        if header or not self.head.startswith((PROXY_1, PROXY_2)):
            self._let_in(header or Header(0, None))
        elif self.hub.now - self.since >= self.SECONDS:
            self.turn_away(f"no whole PROXY header within {self.SECONDS} s")

    def _let_in(self, header):
        self.hub.door.arrivals.discard(self)
        session = self.hub.door.on_client(self.stream, header.host or self.host, False)
        if session and self.head[header.size:]:             # which was taken, not only looked at
            session.inbox.on_data(self.head[header.size:])
            self.hub.keep(session)

    def turn_away(self, why):
        """End it, and say why in the log."""
        self.hub.door.quiet.note(self.host, why)
        self.drop()

    def drop(self):
        """End this client, and only this; it may be a session already."""
        self.hub.door.arrivals.discard(self)
        self.hub.door.put_out(self.stream)


class Refused(Lone):
    """A client that is told why there is no room for it; closed when it has gone."""

    SECONDS, MOST = 5, 100
    port = "refused"

    def __init__(self, hub, stream, host, notice):
        self.hub, self.stream, self.host = hub, stream, host
        stream.owner, stream.on_data = self, self.on_data
        hub.door.refused.add(self, self.SECONDS, self.MOST)
        stream.send(PLAIN_SPELLING.spell(notice, None) + b"\r\n" if notice else b"")
        stream.finish()

    def on_data(self, data):
        """What it types goes nowhere."""

    def turn_away(self, why):
        """Close it, and say why in the log."""
        self.hub.door.quiet.note(self.host, why)
        self.drop()

    def drop(self):
        self.hub.door.refused.discard(self)
        super().drop()

    overdue = drop


class Denials(Survivor):
    """From where nobody is let in: the networks of the setting `deny`, and those of --deny."""

    SURVIVES = "denied",

    def __init__(self, hub):
        self.hub = hub
        self.denied = {}                        # network, as text -> until when, wall clock, or 0

    def cover(self, host):
        """Whether that address is denied."""
        networks = [*self.hub.settings.deny, *map(ipaddress.ip_network, self.in_force())]
        return lies_in(host, networks)

    def in_force(self):
        """What --deny has denied: {network: seconds left, or None: until HAS stops}."""
        now = time.time()
        self.denied = {text: until for text, until in self.denied.items() if not 0 < until <= now}
        return {text: int(until - now) if until else None for text, until in self.denied.items()}

    def add(self, network, seconds):
        """Deny it from now on, for so many seconds or None; return how many users that closes."""
        self.denied[str(network)] = time.time() + seconds if seconds else 0
        return self.enforce()

    def lift(self, network):
        """Deny it no more; whether it was."""
        return str(network) in self.in_force() and self.denied.pop(str(network)) is not None

    def enforce(self):
        """Close who is here from where nobody may come; return how many that are."""
        hosts = set(session.host for session in self.hub.sessions.values())
        hosts = {host for host in hosts if self.cover(host)}
        closed = [session for session in self.hub.sessions.values()
                  if session.state is not State.CLOSING and session.host in hosts]
        for session in closed:
            self.hub.safely(session.close, "its address is denied",
                            self.hub.settings.denied_notice)
        return len(closed)


class Door:
    """Lets clients in: listeners, what is no session yet, limits in all and of each address."""

    def __init__(self, hub):
        self.hub = hub
        self.listeners = []
        self.arrivals, self.refused, self.denials = Lobby(hub), Lobby(hub), Denials(hub)
        self.most_files = 1 << 30               # descriptors this process may have
        self.quiet = QuietLog(hub.later)
        self.visits = QuietLog(hub.later, 2000)     # ordinary users: nobody crowds them out
        self.next_number = 1                    # of sessions; never used again
        self._hosts = Tally()      # address or /64 -> sessions

    # ---- listeners

    def listen(self):
        """Open the listeners the settings ask for; OSError leaves the old ones."""
        old, wanted = self.listeners, self._wanted()
        kept = [it for it in old if it.wanted in wanted]
        missing = [it for it in wanted if it not in [one.wanted for one in kept]]
        try:
            new = self._open(missing)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or len(kept) == len(old):
                raise
            new = self._open_instead(missing, kept)
        for it in old:
            if it not in kept and not it.closed:
                it.close()
        self.listeners = kept + new
        self.hub.changed.add(self.hub)

    def listen_again(self):
        """Another process has died in changing the listeners: open what is missing."""
        try:
            self.listen()
        except OSError as error:
            log.error("cannot listen on %s: %s; mend that, then kill -HUP", error.filename,
                      error.strerror)

    def _wanted(self):
        settings = self.hub.settings
        ports = [(settings.local_port, False)] * (
            bool(settings.local_port) or not settings.local_port_ssl)
        ports += [(settings.local_port_ssl, True)] * bool(settings.local_port_ssl)
        return [(settings.local_address, port, tls) for port, tls in ports]

    def _open_instead(self, missing, kept):
        """Our own, on the same port at another address, is in the way: close it first."""
        old = self.listeners
        for it in set(old) - set(kept):
            it.close()
        self.listeners = kept
        try:
            return self._open(missing)
        except OSError:
            gone = dict.fromkeys(it.wanted for it in old if it not in kept)
            self.listeners = kept + self._open(list(gone))
            raise

    def _open(self, wanted):
        """Listeners for all of `wanted`, or OSError and none."""
        opened = []
        try:
            for address, port, tls in wanted:
                socks = open_listeners(address, port)
                opened += [(sock, tls, (address, port, tls)) for sock in socks]
        except OSError as error:
            for sock, _, _ in opened:
                sock.close()
            raise cannot_listen(error, address, port, tls) from None
        new = [Listener(self.hub, *it) for it in opened]
        for listener in new:
            log.info("listening on %s", listener)
        return new

    # ---- clients

    def on_accept(self, sock, host, tls):
        tune(sock, *CLIENT_KEEPALIVE)
        hub = self.hub
        if sock.fileno() > self.most_files - 20:        # the rest: links, the heartbeat, --status
            self.quiet.note(host, "refused: no descriptors left: raise the limit (ulimit -n)",
                            level=logging.ERROR)
            hang_up(sock)
        elif tls and not hub.settings.server_tls:
            self.quiet.note(host, "refused: TLS is off; its listener is only left because another "
                            "could not be had")
            hang_up(sock)
        elif tls:
            hub.fronts.newest().accept(sock, host, *self._bounds(host))
        elif self._is_front(host):
            self.arrivals.add(Arrival(hub, sock, host), Arrival.NO_HEADER_SECONDS,
                              *self._bounds(host))
        else:
            self.on_client(Stream(hub.selector, sock, None, None), host, False, is_plain=True)

    def _bounds(self, host):
        """How many may be no sessions yet, at a port and from this host: of the descriptors a
        share, for other ports have some, too."""
        most = min(max(100, self.hub.settings.max_clients), self.most_files // 8)
        return most, self.most_of(host)

    def _is_front(self, host):
        return lies_in(host, self.hub.settings.proxy_from)

    def most_of(self, host):
        """How many clients may come from this address; 0: no limit."""
        # many people may come from this machine's own, or a front's
        has_many = ipaddress.ip_address(host).is_loopback or self._is_front(host)
        return 0 if has_many else self.hub.settings.max_per_host

    def on_client(self, stream, host, tls, is_plain=False):
        """A client is let in: make it a session and return that; None if there is no room.
        `is_plain`: another process could do that again, with no more than his socket."""
        refusal = self._refusal(host)
        if refusal:
            why, notice = refusal
            self.quiet.note(host, f"refused: {why}")
            Refused(self.hub, stream, host, notice)
            return None
        try:
            session = self.enter(self.next_number, stream, host, tls)
            self.hub.later(PROBE_SECONDS, session.announce)
            self.hub.links.greet(session)
            if not is_plain:
                self.hub.keep(session)          # at once: he is connected, as far as he knows
        except Exception:
            log.exception("a fault of HAS in letting a client in; it is closed")
            self.put_out(stream)
            return None
        return session

    def enter(self, number, stream, host, tls):
        """A new session, or one of the process before."""
        session = self.hub.sessions[number] = Session(self.hub, number, stream, host, tls)
        self.next_number = max(self.next_number, number + 1)
        self._hosts[host_group(host)] += 1
        return session

    def came(self, session):
        """A user who was away is back, from wherever."""
        self._hosts[host_group(session.host)] += 1

    def left(self, session):
        """A session has ended, or nobody is in front of it any more."""
        self._hosts.take(host_group(session.host))

    def put_out(self, stream):
        """A client could not be let in: end what there is of it, a session or a stream alone."""
        for session in list(self.hub.sessions.values()):
            if session.client is stream:
                session.end()
        stream.drop()

    def _refusal(self, host):
        """Why there is no room for a client: (for the log, for him), or None."""
        settings = self.hub.settings
        if self.denials.cover(host):
            return "its address is denied", settings.denied_notice
        if settings.max_clients and (
                len(self.hub.sessions) - len(self.hub.places) >= settings.max_clients):
            return "max_clients are connected", settings.full_notice
        of_host = self.most_of(host)
        if of_host and self._hosts[host_group(host)] >= of_host:
            return "max_per_host are connected from its address", settings.full_host_notice
        return None

    def look_at_first_words(self, host, data):
        """A front whose address is not in proxy_from shows by its header: its users share one."""
        if data.startswith((PROXY_1, PROXY_2)) and not self._is_front(host):
            self.quiet.once(host, "sends PROXY headers, which are not believed: all its users "
                            "count as one address; if it is your own front, set "
                            f"proxy_from = {host} and kill -HUP")


class Places:
    """The places that are kept for users whose line dropped, oldest first."""

    MOST_BYTES = 64 << 20          # of what all of them have missed
    MOST_ASKED = 20                # clients of one character, whether they live

    def __init__(self, hub):
        self.hub = hub
        self.sessions = {}                      # number -> Session
        self.journal = Journal()                # of what those are sent who may lose their line
        self._hosts = Tally()      # address or /64 -> places
        self._bytes = 0
        self._resting = False

    def __len__(self):
        return len(self.sessions)

    def add(self, session):
        """This one's client has gone. Places are limited as clients are, in all and of each
        address: nobody crowds out the others by logging in and dropping, again and again."""
        door, most, group = self.hub.door, self.hub.settings.max_clients, host_group(session.host)
        self.sessions[session.number] = session
        self._hosts[group] += 1
        door.left(session)
        if most and len(self.sessions) > most:
            self._oldest().place.give_up("the place is given up: max_clients are kept")
        most = door.most_of(session.host)
        if most and self._hosts[group] > most:
            self._oldest(group).place.give_up("the place is given up: max_per_host are kept")

    def _oldest(self, group=None):
        return next(session for session in self.sessions.values()
                    if group is None or host_group(session.host) == group)

    def remove(self, session):
        """Its user is back, or it has ended; whether it was one of them."""
        if self.sessions.pop(session.number, None) is None:
            return False
        self._hosts.take(host_group(session.host))
        return True

    @property
    def written_bytes(self):
        """How much of what each has missed is written down at once."""
        return max(WRITTEN_BYTES, WRITTEN_OF_ALL // (len(self.sessions) or 1))

    def grew(self, number, count):
        """So many bytes more are kept (fewer, if negative) for the session with that number."""
        self._bytes += count
        if number in self.sessions:
            self.hub.changed.add(self.sessions[number])
        if count > 0 and self._bytes > self.MOST_BYTES and self.sessions:
            largest = max((session.client for session in self.sessions.values()),
                          key=lambda client: len(client.out))
            largest.shorten(len(largest.out) // 2)

    @property
    def are_settled(self):
        """Whether it is known what all had not got when their lines dropped."""
        return all(session.client.settled for session in self.sessions.values())

    def kept_for(self, newcomer, login):
        """The oldest place that this login, typed by `newcomer`, opens, or None."""
        return next((session for session in self.sessions.values()
                     if session.place.opens_to(newcomer, login)), None)

    def living_for(self, newcomer, login):
        """The sessions it would open if their clients were dead: the oldest few."""
        living = (session for session in self.hub.sessions.values()
                  if session.number not in self.sessions
                  and session.place.opens_to(newcomer, login))
        return list(itertools.islice(living, self.MOST_ASKED))

    def login_took(self, session):
        """A login was confirmed. Who is in with another password of that character, or was, has
        an old one: an evicted user, perhaps. It opens no place any more."""
        for other in self._others(session, session.character.login):
            if other.number in self.sessions:
                other.place.give_up("the place is given up: its character logged in with another "
                                    "password")
            else:
                other.place.outdated = True
                self.hub.keep(other)

    def _others(self, session, login, same=False):
        """The other sessions of a character, whose password is the same, or another."""
        for other in list(self.hub.sessions.values()):
            theirs = other.character.login
            if (other is not session and theirs and theirs.character == login.character
                    and (theirs.password == login.password) is same):
                yield other

    def changed(self, session, change, before):
        """A change of a login was confirmed: other sessions of it change, too."""
        if self.hub.settings.reattach:
            for other in self._others(session, before, same=True):
                other.character.became(change.of(other.character.login))
                self.hub.keep(other)

    def rest(self):
        """Forget, now and then, what clients have acknowledged."""
        self.journal.deliver()
        sessions = list(self.hub.sessions.values())
        self.hub.sweep((it.client.trail.rest, ()) for it in sessions if it.client.trail)
        if self.hub.settings.reattach:
            self.hub.later(TRAIL_REST_SECONDS, self.rest)
        else:
            self._resting = False

    def look(self):
        """The settings are new, or HAS has just begun."""
        if self.hub.settings.reattach and not self._resting:
            self._resting = True
            self.hub.later(TRAIL_REST_SECONDS, self.rest)
            if not CAN_TELL_UNSEEN:
                log.info("reattach: this platform does not tell what clients have acknowledged: "
                         "what is on the way when a line drops is lost")
        self.hub.each("place.look_anew")
        self.hub.each("place.follow")


@survives
class LoginBrake:
    """Slows down who tries many logins, by address (IPv6: by /64). Pure: the caller has the clock.

    FREE tries go on at once; each further one waits for longer, up to LONGEST. A login that took
    forgives the tries at that character and no others: who guesses may have one of his own.
    """

    FREE, FIRST, LONGEST, MEMORY, MOST = 3, 3, 30, 600, 10000
    __slots__ = ("tries",)

    def __init__(self):
        self.tries = {}            # address -> [(when, character)] of MEMORY seconds, oldest first

    def _recent(self, address, now):
        return [it for it in self.tries.get(address, ()) if it[0] > now - self.MEMORY]

    def left(self, address, now):
        """How many may go on at once."""
        return max(0, self.FREE - len(self._recent(address, now)))

    def wait(self, address, now):
        """Seconds until the next may go on."""
        tries = self._recent(address, now)
        if len(tries) < self.FREE:
            return 0
        seconds = min(self.LONGEST, self.FIRST * (len(tries) - self.FREE + 1))
        return max(0, tries[-1][0] + seconds - now)

    def count(self, address, character, now):
        """A login goes on to the world."""
        tries = (self._recent(address, now) + [(now, character[:64])])[-20:]
        self.tries.pop(address, None)
        self.tries[address] = tries
        if len(self.tries) > self.MOST:
            del self.tries[next(iter(self.tries))]

    def forgive(self, address, character):
        """This login took."""
        left = [it for it in self.tries.pop(address, ()) if it[1] != character[:64]]
        if left:
            self.tries[address] = left


class LoginQueue(Survivor):
    """Typed logins: how many may go on from an address, and which sessions wait for that."""

    SURVIVES = "brake",

    def __init__(self, hub):
        self.hub = hub
        self.brake = LoginBrake()
        self._waiting = {}                      # address -> {session: True}, in order

    @staticmethod
    def _is_free(host):
        return ipaddress.ip_address(host).is_loopback       # many people, or our own machine

    def left(self, host):
        """How many logins may be typed from this address before they are slowed down."""
        return 1 << 30 if self._is_free(host) else self.brake.left(host_group(host), self.hub.now)

    def may_go(self, host):
        """Whether a login from this address need not wait now."""
        return self._is_free(host) or not self.brake.wait(host_group(host), self.hub.now)

    def wait(self, session, character):
        """Seconds until this login (b"": those of a connection that cannot be read) may go on, by
        Lines.try_login(); 0: it does, and counts."""
        group, now = host_group(session.host), self.hub.now
        wait = 0 if self._is_free(session.host) else self.brake.wait(group, now)
        if wait:
            self._waiting.setdefault(group, {})[session] = True
        else:
            self.brake.count(group, character, now)
            self.forget(session)
        return wait

    def took(self, session):
        """A login took. Others of its address may have waited for that."""
        group = host_group(session.host)
        self.brake.forgive(group, session.character.login.character)
        for other in list(self._waiting.get(group, ())):
            self.hub.safely(other.lines.try_login)

    def forget(self, session):
        """It waits no more."""
        group = host_group(session.host)
        if self._waiting.get(group, {}).pop(session, None) and not self._waiting[group]:
            del self._waiting[group]


# ---- who may connect to the world, and when

@survives
class Suspects:
    """Whose login may kill the world: who comes last, whom HAS logs in no more (rule 4).

    Who came shortly before a death is a suspect; behind the next in a row only who came before
    both, and about as long. A few such deaths mean little: worlds die, admins try out how HAS takes
    it, and everybody comes back at once. After more than PATIENCE in a row suspects come when all
    others are through, in groups: the last group before a death is suspected further, all others
    are cleared, until one is left. The pause between groups is longer than a login has taken to
    kill. All pauses together are short at first, and twice as long after each death: many users
    wait only where a world dies again and again. A death that no suspect can have caused begins
    the search anew.

    If the world dies behind one who came alone, that is a strike; a login that the world outlives
    clears him. Two strikes bar him, or more, until they can hardly be chance: a world that dies
    often dies behind innocents, too. `who` is a character, or the number of a session at the login
    screen. Pure.
    """

    WINDOW, APART, UNLIKE, CALM, LONGEST = 5, 0.75, 2.5, 10, 60     # seconds
    PATIENCE = 5                   # deaths; less finds him sooner
    CHANCE, AT_ONCE = 1e-4, 0.02   # of strikes that bar; shorter times count as this
    ELSEWHERE = "_came",           # see Links.arrivals_text
    __slots__ = ("_came", "_suspects", "_begun", "_latest", "_group_at", "_streak", "pause",
                 "barred")

    def __init__(self):
        self._came = {}            # who -> (when, whether alone), of this life
        # who -> (seconds from his coming to the last death, strikes: [(the same, the world's age)])
        self._suspects = {}
        self._begun = None         # when this life began; None while there is none
        self._latest = self._group_at = 0.0     # when anybody, and a suspect, came last
        self.pause = self.APART    # seconds between groups
        self._streak = 0           # deaths in a row that came shortly behind somebody
        self.barred = set()

    def found(self, now, here):
        """The world is up, in a new life; `here`: who may come. Who has gone: only his strikes."""
        self._begun, self._came, self._group_at = now, {}, now - self.pause
        self._suspects = {who: it for who, it in self._suspects.items() if it[1] or who in here}
        self.barred = {who for who in self.barred if who in here or isinstance(who, bytes)}

    def came(self, who, now, typed=False):
        """Somebody is let in to the world: HAS brings him (back), or he has typed a login."""
        is_next = not typed and self.is_suspect(who)
        alone = is_next and self.together == 1 and now - self._latest >= self.pause
        self._came.pop(who, None)               # the dict is in the order of their coming
        self._came[who] = (now, alone)
        self._latest = now
        self._group_at = now if is_next else self._group_at

    def outlived(self, now):
        """Forget who is nobody that died() would look at: he came too long ago."""
        self._came = {who: came for who, came in self._came.items() if now - came[0] <= self.WINDOW
                      or who in self.barred}

    @property
    def columns(self):
        """Who came in this life, as plain values: who, at which millisecond, whether alone."""
        return ([who.decode("latin-1") if isinstance(who, bytes) else who for who in self._came],
                [int(when * 1000) for when, _ in self._came.values()],
                [int(alone) for _, alone in self._came.values()])

    @columns.setter
    def columns(self, columns):
        self._came = {who.encode("latin-1") if isinstance(who, str) else who:
                      (when / 1000, bool(alone)) for who, when, alone in zip(*columns)}

    def died(self, now):
        """The world has died; returns the set of those who are barred from now on."""
        if self._begun is None:
            return set()
        age, self._begun = now - self._begun, None
        since = {who: now - when for who, (when, _) in self._came.items()}
        self.barred -= {who for who, seconds in since.items() if seconds > self.WINDOW}
        near = self._near(since)
        self._suspects = {who: (since[who], self._strikes(who)) for who in near}
        if not near:
            self._streak = 0
            return set()
        self.pause = max(self.pause, self.APART + min(since[who] for who in near))
        who, *others = near
        if others or not self._came[who][1]:
            return set()
        self._strikes(who).append((since[who], age))
        if self._chance(self._strikes(who)) > self.CHANCE:
            return set()
        del self._suspects[who]
        self.barred.add(who)
        return {who}

    def _near(self, since):
        """Whose coming, so many seconds ago, may have caused this death and those before it; if
        nobody's, then who may have caused this one."""
        is_search, self._streak = self._streak > self.PATIENCE, self._streak + 1
        alike = {who: since[who] for who, (before, _) in self._suspects.items()
                 if who in since and abs(since[who] - before) <= self.UNLIKE}
        narrow = [min(self.pause, self.WINDOW)] if is_search else []
        for window in narrow + [self.WINDOW]:
            near = [who for who, seconds in alike.items() if seconds < window]
            if near:
                return near
        self._streak = min(self._streak, self.PATIENCE)
        self.pause = min(self.CALM, 2 * self.pause) if is_search else self.APART
        return [who for who, seconds in since.items() if seconds <= self.WINDOW]

    def _strikes(self, who):
        return self._suspects.get(who, (0, []))[1]

    def _chance(self, strikes):
        """How probable it is that deaths at any moment of these lives all came as soon behind him
        as the latest of them did. One is always chance."""
        latest = max(self.AT_ONCE, *(seconds for seconds, _ in strikes))
        chances = [latest / max(age, latest) for _, age in strikes]
        return math.prod(chances) if len(strikes) > 1 else 1

    @property
    def together(self):
        """How many suspects come at a time."""
        patience = 2 ** min(self._streak - self.PATIENCE - 1, 6)        # seconds
        return max(1, -(-len(self._suspects) // int(1 + patience / self.pause)))

    def is_suspect(self, who):
        """Whether he comes last."""
        return self._streak > self.PATIENCE and who in self._suspects

    def wait(self, who, now):
        """Seconds until this suspect may come. The first group need not wait. The calm before one
        alone grows with his strikes: a world that always dies at the same age dies without him
        then. Others do not put him off for ever."""
        if self.together > 1:
            return max(0.0, self._group_at + self.pause - now)
        strikes = len(self._strikes(who))
        calm = max(self.pause, strikes and min(self.CALM, self.WINDOW * 2 ** (strikes - 1)))
        return max(0.0, min(self._latest + calm, (self._begun or now) + self.LONGEST) - now)


class Knock(Lone):
    """A connect to the world, closed as soon as it stands: it wakes a server that has forgotten
    those before it (see Dialect.forgets_connects)."""

    def __init__(self, hub):
        self.stream = Stream.connect(hub.selector, hub.world.target, self, None)

    def on_stream_open(self, stream):
        self.drop()


class Links(Survivor):
    """Who may connect to the world, and when: all links are opened here (rule 4).

    A session calls add(). Its turn comes, paced for the world's family: TURN. It is out of
    the others' way when its link speaks, or has failed, or is in: spoke(), arrived(). Sessions of
    one character wait for each other at the end: settle(). Suspects come when all are through.
    """

    SURVIVES = "suspects", "noise", "doubles", "arrivals_text"

    def __init__(self, hub):
        self.hub = hub
        self.suspects = Suspects()
        self.noise = Noise()
        self.doubles = set()                    # characters with several sessions at its return
        self.choosing = set()                   # numbers of sessions that wait for a check
        self._waiting = collections.OrderedDict()           # sessions as its keys: a set in order
        self._last = collections.OrderedDict()  # the same of suspects
        # session -> when its link was opened, oldest first, and has shown nothing yet
        self._arriving = collections.OrderedDict()
        self._next_at, self._last_woken = 0.0, False
        self._woken_at = math.inf               # when _open_some() is due
        self._asked = False                     # the heartbeat, for answered()
        self._mute = {}                         # session -> serial of a link that has shown nothing
        self._knocked_at = 0.0

    def __contains__(self, session):
        return session in self._waiting or session in self._last

    def survivors(self):
        """No more of the suspects than counts."""
        self.suspects.outlived(self.hub.now)
        return super().survivors()

    @property
    def arrivals_text(self):
        """Who has come just now, for both, as one text: one by one thousands are packed for so long
        that everybody would notice."""
        return json.dumps([self.noise.columns, self.suspects.columns])

    @arrivals_text.setter
    def arrivals_text(self, text):
        self.noise.columns, self.suspects.columns = json.loads(text)

    # ---- the world comes and goes

    def found(self, is_new_life):
        """The world is up: count who comes together."""
        sessions = self.hub.sessions.values()
        if is_new_life:
            here = {session.character.would_be(session.number) for session in sessions}
            self.suspects.found(self.hub.now, here)
        logins = [session.character.login or session.character.pending for session in sessions]
        names = collections.Counter(
            login.character for login in logins if login and not login.is_guest)
        self.doubles = {name for name, count in names.items() if count > 1}

    def died(self, when):
        """The world has died: who may have killed it?"""
        for who in self.suspects.died(when):
            name = (printable(who) if isinstance(who, bytes) else
                    f"session {who}, which has no login,")
            log.warning("the world died each time just after %s had come back: HAS brings it back "
                        "no more. Mend what runs at its login (@aconnect), or its client; who logs "
                        "in by hand, and the world lives on, is cleared", name)
        self.clear()

    def clear(self):
        """There is no world to connect to; every session will be added again when there is."""
        self._asked = False
        self._waiting.clear()
        self._last.clear()

    # ---- one session

    def greet(self, session):
        """A new session: to the world's login screen, or told that there is none now."""
        condition = self.hub.health.condition
        if condition is Condition.DOWN:
            session.hold.begin(self.hub.offline_notice)
        elif condition is not Condition.STARTING:
            self.add(session)
            session.hold.on_silence(condition is Condition.SILENT)

    def add(self, session):
        """Open the session's link when it is its turn."""
        is_suspect = self.suspects.is_suspect(session.who)
        if is_suspect and not self._last:
            log.warning("the world died right behind those who had come, each time: they come "
                        "last now, %d at a time, %.3g s apart", self.suspects.together,
                        self.suspects.pause)
        (self._last if is_suspect else self._waiting).setdefault(session)
        self.go_on()

    def arrived(self, session):
        """The session's link has failed, or needs nobody's patience any more: the next may come."""
        if self._arriving.pop(session, None) is not None:
            self.go_on()

    def spoke(self, session):
        """The first bytes came over the session's link: the server has accepted it, and all that
        were opened before it, for the kernel hands them out in order. What is scarce is the
        server's listen backlog, not its logins."""
        self._mute.pop(session, None)
        if session not in self._arriving or self._one_by_one:
            return
        while self._arriving.popitem(last=False)[0] is not session:
            pass
        self.go_on()

    def answered(self):
        """The world has turned since the heartbeat was asked: what was opened a while before has
        been accepted, silent as it is."""
        self._asked, since = False, self.hub.now - SILENT_LINK_SECONDS
        if not self._one_by_one:
            while self._arriving and next(iter(self._arriving.values())) <= since:
                self._arriving.popitem(last=False)
        self.go_on()

    def forget(self, session):
        """The session has ended."""
        for sessions in (self._waiting, self._last, self._arriving, self._mute):
            sessions.pop(session, None)
        self.go_on()                            # the last of the others, perhaps
        self.settle(session)                    # others of its character may have waited for it

    # ---- turns

    def go_on(self):
        """Open links soon, if any are wanted."""
        if self._last and not (self._last_woken or self._waiting or self._arriving):
            self._last_woken = True
            self.hub.later(0, self._open_last)
        if self._waiting:
            self._open_at(max(self.hub.now, self._next_at))

    def _open_at(self, when):
        """Have _open_some() run then, or sooner if it will in any case."""
        if when < self._woken_at:
            self._woken_at = when
            self.hub.later(when - self.hub.now, self._open_some, when)

    def _open_some(self, woken_at):
        if woken_at != self._woken_at:
            return                              # it was wanted sooner meanwhile
        self._woken_at = math.inf
        hub, rate, opened = self.hub, self.hub.settings.resume_rate, 0
        while self._waiting and hub.is_up:
            wait = 0 if rate == 0 else self._wait()
            if wait is None:
                return                          # arrived() and spoke() call again
            if wait:
                self._open_at(hub.now + wait)
                return
            if rate and hub.now < self._next_at or opened == LINKS_A_TURN:
                self.go_on()
                return
            session, _ = self._waiting.popitem(last=False)
            if not session.wants_link:
                continue
            self._next_at = hub.now + 1 / rate if rate else 0.0
            self._arriving[session] = hub.now
            opened += 1
            self._open(session)

    def _open(self, session):
        """It is its turn. The lines that tell others of its arrival will be hidden."""
        if session.state in AWAY and session.character.trials:
            self._expect_noise(session.character.trials[0].character)
        self.hub.safely(session.handle, Event.TURN)
        self.watch(session)

    @property
    def _one_by_one(self):
        """Whether each return must end before the next: sessions of one character on TinyMUSH."""
        return self.hub.world.dialect.characters_one_by_one and bool(self.doubles)

    def _wait(self):
        """Seconds until the family takes one more link; None: when one that arrives has spoken.

        One that is silent for a while (a name is looked up) holds up nobody, as long as the
        backlog has room. When that is full of them, the heartbeat is asked: see answered().
        """
        dialect, now = self.hub.world.dialect, self.hub.now
        most = 1 if self._one_by_one else max(dialect.at_once, dialect.most_silent)
        if len(self._arriving) >= most:
            if most == dialect.most_silent and not self._asked:
                self._asked = True
                self.hub.later(SILENT_LINK_SECONDS, self.hub.ask_whether_it_turns)
            return None
        fresh = [at for at in self._arriving.values() if now - at < SILENT_LINK_SECONDS]
        return SILENT_LINK_SECONDS - (now - fresh[0]) if len(fresh) >= dialect.at_once else 0

    def _open_last(self):
        """When all others are through: in groups, with pauses, so that it is seen who kills the
        world."""
        self._last_woken = False
        hub = self.hub
        if self._waiting or self._arriving or self.choosing or not hub.is_up:
            return                              # go_on() is called again when that has changed
        for session in list(self._last)[:self.suspects.together]:
            wait = self.suspects.wait(session.who, hub.now)
            if wait:
                self._last_woken = True
                hub.later(wait, self._open_last)
                break
            del self._last[session]
            self._waiting[session] = None       # as any other now
        self.go_on()

    # ---- links that a server may have forgotten

    def watch(self, session):
        """Its link is being opened, or has shown nothing yet."""
        if session.link and self.hub.world.dialect.forgets_connects:
            self._mute[session] = session.serial
            self.hub.later(WAKE_SECONDS[0], self._wake, session, session.serial)

    def _wake(self, session, serial, times=1):
        """Nothing has come on this link, though the world answers: perhaps nobody has accepted it.
        One knock serves all."""
        if self._mute.get(session) != serial:
            return                              # it has spoken, or there is another one
        if serial != session.serial or not session.link or session.state is State.CLOSING:
            del self._mute[session]
            return
        is_up = self.hub.health.condition is Condition.UP
        if is_up and session.linked and self.hub.now - self._knocked_at >= WAKE_SECONDS[0] / 2:
            self._knocked_at = self.hub.now
            log.debug("%s: the world has shown nothing: woken by one more connect", session)
            with contextlib.suppress(OSError):
                Knock(self.hub)
        if times < len(WAKE_SECONDS):
            self.hub.later(WAKE_SECONDS[times], self._wake, session, serial, times + is_up)

    # ---- sessions of one character, and what others see

    def siblings(self, session):
        """The other sessions of its character that are being logged in, or will be at once."""
        name = session.character.trials[0].character
        if name not in self.doubles:            # the usual case, without a look at everybody
            return []
        return [other for other in self.hub.sessions.values()
                if other is not session and other.character.trials
                and other.character.trials[0].character == name
                and (other.state in COMING_BACK or other in self
                     or other.number in self.choosing)]

    def settle(self, session):
        """One session of a character is in, or has failed: the last one lets all go on."""
        siblings = self.siblings(session) if session.character.trials else []
        if all(other.way_back.settled for other in siblings):
            for other in siblings + [session]:
                self.hub.safely(other.way_back.settle)

    def _expect_noise(self, name):
        quiet = not self.noise
        self.noise.expect(name, self.hub.now + NOISE_SECONDS)
        if quiet:
            self.hub.later(NOISE_SECONDS, self.prune_noise)
            self.hub.each("screen.choose_path")

    def prune_noise(self):
        """Hide no more what has had its time."""
        ends = self.noise.forget(self.hub.now)
        if ends is not None:
            self.hub.later(max(0.1, ends - self.hub.now), self.prune_noise)


# ---- what is in TLS, which another process speaks

def is_stopped(pid):
    """Whether a process was stopped by a signal or a debugger (proc(5)), or is not there."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] in b"Tt"
    except OSError:
        return True


class KnownFront:
    """A TLSFront, as the worker knows it: is given clients, and what is to be connected, and gives
    back plain streams. The next worker goes on with it."""

    MOST_WAITING = 100             # messages: it does not read, or has still to be started
    LOOK_SECONDS, SILENT_SECONDS = 5, 30

    def __init__(self, fronts, name, sock, program):
        self.fronts, self.hub, self.name, self.program = fronts, fronts.hub, name, program
        self.pid, self.since, self.is_retired = 0, self.hub.now, False
        self.channel = Channel(self.hub.selector, sock, self)
        self._recipes = set()      # names of those that it was given
        self._opening = {}         # number -> stream
        self.fars = {}             # number -> FarEnd
        self._late = collections.deque()        # messages that were read while there was no time
        self._silent = 0           # seconds in which we were here, and it has said nothing

    def __str__(self):
        return f"the process that speaks TLS (pid {self.pid})"

    def look(self):
        """Now and then: does it still turn? Who is in it would be lost with it, so it is not
        killed: it may go on, but nobody else is to wait for that."""
        if self.is_retired or not self.pid:
            return
        if self._silent >= self.SILENT_SECONDS:
            stopped = is_stopped(self.pid)
            log.error("%s has not answered for %d s%s: its %d connections stand still; who comes "
                      "now is served by another; %s", self, self._silent,
                      ", for it was stopped" if stopped else " (a bug: report it)",
                      len(self.fars), f"have it go on: kill -CONT {self.pid}" if stopped else
                      f"kill -9 {self.pid} ends them, and their users can come again")
            self.retire()
            self.fronts.newest()
        self._silent += self.LOOK_SECONDS
        self.channel.send({"do": "answer"})

    def far_end(self, number):
        """The far end of a stream that leads there."""
        return self.fars.setdefault(number, FarEnd(self, number))

    # ---- what is asked of it

    def _ask(self, what, number, recipe, fds, **values):
        if recipe.name not in self._recipes:
            self._recipes.add(recipe.name)
            keys = TLS_KEYS[recipe.role]
            files = [key for key in keys if key in recipe.files and MEMORY_FILES]
            self.channel.send(
                {"do": "recipe", "name": recipe.name, "role": recipe.role, "files": files,
                 "values": dict(zip(keys, recipe.values))},
                [memory_file(recipe.files[key]) for key in files])
        self.channel.send({"do": what, "number": number, "recipe": recipe.name, **values}, fds)

    def accept(self, sock, host, most, of_host):
        """A client: have it speak TLS with that. No more than `most`, and of its host, shall be
        there without an answer."""
        if len(self.channel.waiting) > self.MOST_WAITING:
            sock.close()
            self.hub.door.quiet.note(host, f"refused: {self} does not keep up")
        else:
            self._ask("accept", secrets.randbits(48), self.hub.settings.recipes["server"],
                      [sock.detach()], host=host, most=most, of_host=of_host)

    def connect(self, world, owner, on_data):
        """As Stream.connect, in TLS."""
        ours, theirs = socket.socketpair()
        number, (family, target) = secrets.randbits(48), world.target
        stream = Stream(self.hub.selector, ours, owner, on_data, connecting=True,
                        far=self.far_end(number))
        self._opening[number] = stream
        self._ask("connect", number, world.tls, [theirs.detach()], family=int(family),
                  target=list(target), host=world.address.host)
        return stream

    def left(self, number):
        """Nobody reads that stream any more."""
        self.channel.send({"do": "left", "number": number})

    def ask_for_wires(self):
        """Have it give a copy of every connection: this is another worker."""
        for number in self.fars:
            self.channel.send({"do": "wire", "number": number})

    def retire(self):
        """Have it end with its last connection."""
        if not self.is_retired:
            self.is_retired = True
            self.channel.send({"do": "retire"})

    # ---- what it says

    def on_message(self, fds, message):
        """It says something."""
        self._silent, socks = 0, [socket.socket(fileno=fd) for fd in fds]
        self.channel.dispatch(message.pop("say"), socks, message, f"what {self} says")

    def hear(self):
        """Learn why streams have ended; all else that was said has time."""
        while True:
            said = self.channel.read()
            if said is None:
                break
            for fds, message in said:
                if message["say"] == "ended":
                    self.on_message(fds, message)
                else:
                    self._late.append((fds, message))
        if self._late:
            self.hub.later(0, self._catch_up)

    def _catch_up(self):
        while self._late:
            self.on_message(*self._late.popleft())

    def on_channel_end(self):
        """It has ended."""
        self.hub.later(0, self._gone)           # a stream may just be asking why

    def _gone(self):
        self._catch_up()
        self.fronts.on_gone(self)
        opening, self._opening = self._opening, {}
        for stream in opening.values():
            self._fail(stream, FarEnd.LOST)
        for far in list(self.fars.values()):
            self.hub.safely(far.over, None)

    def _fail(self, stream, why):
        if not stream.closed:
            stream.far.ended(why)
            self.hub.safely(stream.end, "")

    def _on_open(self, socks, number, host):
        stream, far = self._opening.pop(number, None), self.far_end(number)
        if host is None and stream and socks:
            far.take(socks[0])
            if not stream.closed:
                self.hub.safely(stream.opened)
        elif host is not None and len(socks) == 2:
            far.take(socks[1])
            client = Stream(self.hub.selector, socks[0], None, None, far=far)
            self.hub.door.on_client(client, host, True)
            self.channel.send({"do": "taken", "number": number})        # it is written down
        else:                                   # what was to be connected for another worker; or:
            for sock in socks:
                sock.close()
            why = "too many files are open or in flight: raise the limit (ulimit -n)"
            if stream:
                self._fail(stream, why)
            elif host:
                self.hub.door.quiet.note(host, f"could not be let in: {why}", level=logging.ERROR)

    def _on_failed(self, socks, number, host, why):
        stream, far = self._opening.pop(number, None), self.fars.pop(number, None)
        if host is not None:
            self.hub.door.quiet.note(host, why)
        elif stream and far:
            self._fail(stream, why)

    def _on_wire(self, socks, number):
        for sock in socks:
            if number in self.fars:
                self.fars[number].take(sock)
            else:
                sock.close()

    def _on_ended(self, socks, number, why):
        if number in self.fars:
            self.fars[number].ended(why)

    def _on_over(self, socks, number, unseen):
        far = self.fars.pop(number, None)
        if far:
            far.ended("")                       # if nothing worse was said
            far.over(unseen)

    @staticmethod
    def _on_log(socks, level, text):
        log.log(level, "%s", text)

    def _on_here(self, socks):
        """The answer to look()."""


class Fronts(Survivor):
    """TLS: all of it is spoken by another process, which outlives this one. That one runs the same
    program: of another there is another, and the old one ends with its last connection."""

    SURVIVES = "pumps",
    SHORT_LIFE = 30                # seconds

    def __init__(self, hub):
        self.hub = hub
        self.all = []              # of KnownFront, the newest last
        self.pumps = []            # the process ids of our children among them
        self.launch = None         # (descriptor of its end of a channel) -> process id; OSError
        self.program = 0           # which one that starts
        self._quick = 0            # deaths one after another, each soon after a start
        self._stops_at = None      # when nobody waits for them any more
        self._watch()

    def _watch(self):
        self.hub.later(KnownFront.LOOK_SECONDS, self._watch)
        for front in list(self.all):
            front.look()

    def newest(self):
        """The one that is given what is new; OSError."""
        usable = [it for it in self.all if not (it.is_retired or it.channel.closed)]
        return usable[-1] if usable else self._begin()

    def _begin(self):
        ours, theirs = socket.socketpair()
        front = KnownFront(self, secrets.token_hex(4), ours, self.program)
        self.all.append(front)
        self.hub.changed.add(self.hub)
        pause = back_off(self._quick)
        if pause:                               # meanwhile what is asked of it waits
            self.hub.later(pause, self._launch, front, theirs)
        else:
            self._launch(front, theirs)
        return front

    def _launch(self, front, theirs):
        try:
            front.pid, front.since = self.launch(theirs.fileno()), self.hub.now
            self.pumps.append(front.pid)
            log.info("%s is started", front)
        except OSError as error:                # its channel ends: on_gone() follows
            log.error("the process that speaks TLS cannot be started: %s", error)
        theirs.close()
        self.hub.changed.add(self.hub)

    def look(self):
        """The settings are new, or HAS has just begun."""
        settings = self.hub.settings
        is_wanted = bool(settings.server_tls or settings.world_tls)
        for front in self.all:
            if not is_wanted or front.program != self.program:
                front.retire()
        if is_wanted:
            self.newest()

    def go_on(self):
        """This is another worker than the one that began them."""
        for front in self.all:
            front.ask_for_wires()
        self.look()

    def on_gone(self, front):
        """One has ended."""
        self.all.remove(front)
        self.hub.changed.add(self.hub)
        if front.is_retired and not front.fars:
            return
        log.error("%s has ended: what was in TLS there is lost (%d connections)%s", front,
                  len(front.fars), "" if self._stops_at else "; it is started anew")
        if not (front.is_retired or self._stops_at):
            is_quick = self.hub.now - front.since < self.SHORT_LIFE
            self._quick = self._quick + 1 if is_quick else 0
            self._begin()

    def stop(self):
        """HAS stops: have all be sent what they still hold."""
        self._stops_at = self.hub.now + GOODBYE_SECONDS + 1
        self.hub.later(GOODBYE_SECONDS + 1, bool)           # for are_done
        for front in self.all:
            front.retire()

    @property
    def are_done(self):
        """Whether nobody need wait for them."""
        return not self.all or self._stops_at is not None and self.hub.now >= self._stops_at

    def reap(self):
        """CHLD: collect those that have ended."""
        for pid in list(self.pumps):
            try:
                done, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:           # its worker has died
                done, status = pid, 0
            if done:
                self.pumps.remove(pid)
            if status:
                log.error("the process that speaks TLS (pid %d) ended by a fault or was killed "
                          "(wait status %d)", pid, status)

    # ---- what another process takes over

    def pack(self, name):
        """As Stream.pack()."""
        return [{"fd": name(it.channel.sock), "name": it.name, "pid": it.pid,
                 "program": it.program, "retired": it.is_retired}
                for it in self.all if not it.channel.closed]

    def unpack(self, packed, take):
        """Take up what pack() gave; nothing is sent yet (see go_on)."""
        for values in packed:
            front = KnownFront(self, values["name"], take(values["fd"]), values["program"])
            front.pid, front.is_retired = values["pid"], values["retired"]
            self.all.append(front)

    def far_end(self, name):
        """The FarEnd of that name, if there is one; else, and for None, None."""
        for front in self.all:
            if name and name[0] == front.name:
                return front.far_end(name[1])
        return None


def back_off(quick, first=0.1, longest=30):
    """Seconds until the next start of what has ended, `quick` times one after another soon after
    its start: what does so by itself does so again."""
    return 0 if quick < 2 else min(longest, first * 2 ** min(quick - 2, 10))


# ---- what admins are told who do not look

# Runs the command in its arguments, and ends all that came of it: after so many seconds, or when
# there are too many processes. One of its own, for it must do so whatever becomes of HAS. Prints
# "done" or what went wrong, and the last that the command has said.
GUARD = r"""
import os, select, signal, subprocess, sys, time

def living(session):
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            if os.getsid(int(name)) == session:
                yield int(name)
        except OSError:
            pass

if os.fork():
    os._exit(0)                     # HAS need not wait for the other
os.setsid()
seconds, most, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
try:
    hook = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)
except OSError as error:
    sys.exit(print("it cannot be run:", error.strerror))
os.setpriority(os.PRIO_PROCESS, hook.pid, 10)
until, said, reading, over, trouble = time.monotonic() + seconds, b"", [hook.stdout], False, ""
while not over and (reading or hook.poll() is None or any(living(hook.pid))):
    if select.select(reading, [], [], 0.1)[0]:
        data = os.read(hook.stdout.fileno(), 65536)
        said = (said + data)[-300:]
        if data:
            time.sleep(0.1)         # a flood waits in the pipe
        else:
            reading = []
    if sum(1 for _ in living(hook.pid)) > most:
        over, trouble = True, "it was killed with more than %d processes" % most
    elif time.monotonic() > until:
        over, trouble = True, "it was killed after %d s" % seconds if hook.poll() is None else ""
status, killed, new = hook.poll(), set(), {-hook.pid} if over else set()
while new:                          # first its group, at once; then who had left that
    for pid in new:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.02)
    hook.poll()
    killed |= new
    new = set(living(hook.pid)) - killed
print(trouble or ("status %d" % status if status else "done"))
print(said.decode("utf-8", "replace"))
"""


class HookRun(Lone):
    """One run of on_event; `done(output of GUARD)` is called at its end."""

    SECONDS, MOST_PROCESSES = 30, 64

    def __init__(self, hub, command, environment, done):
        self._said, self._done = b"", done
        ours, theirs = socket.socketpair()
        self.stream = Stream(hub.selector, ours, self, self._on_output)
        arguments = [sys.executable, "-I", "-S", "-", str(self.SECONDS),
                     str(self.MOST_PROCESSES), *command]
        try:
            self._child = subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE,
                                           stdout=theirs, stderr=subprocess.DEVNULL)
            with self._child.stdin as program:  # a pipe has room for it
                program.write(GUARD.encode())
        except BaseException:
            self.stream.drop()
            raise
        finally:
            theirs.close()
        hub.later(1, self._child.poll)          # it has made another, and has ended

    def _on_output(self, data):
        self._said = (self._said + data)[-2000:]

    def on_stream_end(self, stream, reason):
        """It is over."""
        self.drop()
        self._child.poll()
        self._done(self._said.decode("utf-8", "replace"))


class Hook(Survivor):
    """Runs on_event when something happens to the world. Nobody waits for it."""

    SURVIVES = "held_events", "last_event", "lost_since", "refused"
    PAUSE_SECONDS = 10             # least time between two runs for the same kind of event
    NOT_PASSED_ON = {b"NOTIFY_SOCKET", b"LISTEN_FDS", b"LISTEN_PID", b"LISTEN_FDNAMES",
                     b"WATCHDOG_USEC", b"WATCHDOG_PID"}         # between systemd and HAS

    def __init__(self, hub):
        self.hub = hub
        self.held_events = {}                   # event -> its values: it comes too soon
        self.last_event, self.lost_since = "", 0.0          # of down, silent, moved, up
        self.refused = False                    # the world does not take the heartbeat
        self._next_at = {}                      # event -> when it may be told of again
        self._failing = None                    # the command of which the log has said so

    def lost(self, event, seconds, reason):
        """Users lost the world so many seconds ago: it is down, or silent."""
        self.last_event, self.lost_since = event, time.time() - seconds
        self._happened(event, seconds, reason)

    def back(self, reason):
        """It is there: news if it was not."""
        if self.last_event in ("down", "silent"):
            self.last_event = "up"
            self._happened("up", time.time() - self.lost_since, reason)

    def moved(self, old):
        """Users go from that address to another, where the world is up."""
        away = self.last_event in ("down", "silent")
        self.last_event = "moved"
        self._happened("moved", time.time() - self.lost_since if away else 0, f"from {old}")

    def found(self, world):
        """A world was confirmed: is the heartbeat logged in?"""
        refused = world.blind and world.dialect.logs_in
        if refused and not self.refused:
            self._happened("refused", 0, "the world does not take the heartbeat's login: " + (
                "mend hb_user and hb_pass, then HUP" if world.shut else
                "are logins disabled, or is it full?"))
        self.refused = refused

    def _happened(self, event, seconds, reason):
        hub = self.hub
        if not hub.settings.on_event:
            return
        values = {"EVENT": event, "WORLD": str(hub.address), "USERS": str(len(hub.sessions)),
                  "SECONDS": str(int(seconds)), "REASON": printable(reason)}
        wait = self._next_at.get(event, hub.now) - hub.now
        if wait <= 0:
            self._run(values)
            return
        if event not in self.held_events:
            hub.later(wait, self._run_held, event)
        self.held_events[event] = values        # the newest counts

    def _run_held(self, event):
        values = self.held_events.pop(event, None)
        if values:                              # else another timer was first: see go_on()
            self._run(values)

    def go_on(self):
        """In a new process: what was held in the old one."""
        for event in self.held_events:
            self.hub.later(self.PAUSE_SECONDS, self._run_held, event)

    def _run(self, values):
        event, command = values["EVENT"], self.hub.settings.on_event
        self._next_at[event] = self.hub.now + self.PAUSE_SECONDS
        if not command:
            return
        environment = {name: text for name, text in os.environb.items()
                       if name not in self.NOT_PASSED_ON}
        environment.update({f"HAS_{name}".encode(): text.encode("utf-8", "replace")
                            for name, text in values.items()})
        log.debug("on_event: %s is run for %s", command[0], event)
        try:
            HookRun(self.hub, command, environment,
                    lambda said: self._on_end(event, command, said))
        except OSError as error:
            self._on_end(event, command, f"it cannot be run: {error.strerror}")

    def _on_end(self, event, command, said):
        verdict, _, said = said.partition("\n")
        failed, was_failing = verdict != "done", self._failing == command
        if failed and not was_failing:
            words = printable(" ".join(said.split()))
            log.warning("on_event: nobody may have been told of %s: %s%s; mend it; this is not "
                        "said again before it has worked", event,
                        printable(verdict) or "it has ended without a word",
                        f"; it said: {words}" if words else "")
        elif was_failing and not failed:
            log.info("on_event: works again")
        self._failing = command if failed else None


# ---- what admins ask

class Caller(Lone):
    """A connection to the control socket: a line of JSON is answered by one line of JSON.

    That may come later, for some wait for the outcome of what they ask (WAITS); or never, if this
    process ends over it: then the end of the connection is the answer.
    """

    SECONDS, WAITS = 10, 60

    def __init__(self, hub, sock):
        self.hub, self.asked, self._waits = hub, b"", False
        self.stream = Stream(hub.selector, sock, self, self.on_data)
        hub.later(self.SECONDS, self._look)

    def _look(self):
        """Its time is over, unless it waits for an outcome."""
        if self._waits:
            self.hub.later(self.WAITS, self.stream.drop)
        else:
            self.stream.drop()

    def on_data(self, data):
        """A part of the request."""
        self.asked += data
        if self._waits or b"\n" not in self.asked and len(self.asked) <= 65536:
            return
        self._waits = True
        try:
            answer = self.hub.control.command(json.loads(self.asked.decode()), self.answer)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            answer = {"error": f"bad request: {error}"}
        if answer is not None:
            self.hub.keep(self.hub)             # what is done outlives us
            self.answer(answer)

    def answer(self, answer, finish=True):
        """What came of it, a dictionary or its JSON; `finish`: and nothing more is going to."""
        if not self.stream.closed:
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.stream.send(text.encode() + b"\n")
            if finish:
                self._waits = False
                self.stream.finish()


class ControlListener(Listener):
    """The control socket, for its owner alone. Deleted, it comes back by itself."""

    LOOK_SECONDS = 5

    def __init__(self, hub, path, sock=None, identity=None):
        self.path, self._trouble = path, None
        super().__init__(hub, sock or self._bind(path), False, None)
        self.identity = identity or self._on_disk()         # of our file: another may come there
        hub.later(self.LOOK_SECONDS, self._look)

    def _bind(self, path):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)                  # no moment in which others may connect
        try:
            self._replace_dead(path)
            sock.bind(path)
            sock.listen(16)
        except OSError:
            sock.close()
            raise
        finally:
            os.umask(mask)
        return sock

    @staticmethod
    def _replace_dead(path):
        """Remove the socket of a HAS that has died; OSError(EADDRINUSE) if one lives there."""
        alive = OSError(errno.EADDRINUSE, "another HAS is running with this has.conf", path)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
                trial.setblocking(False)
                trial.connect(path)
            raise alive
        except BlockingIOError:                 # it has no time to accept us, but it lives
            raise alive from None
        except ConnectionRefusedError:          # a file that is no socket refuses, too
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EEXIST, "there is a file that is no socket", path) from None
            os.unlink(path)
        except FileNotFoundError:
            pass

    def _on_disk(self):
        """What tells the file at our path from any other; None if there is none."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _look(self):
        """Make the socket anew if its file has gone; another's, or another file, is left alone."""
        if self.closed:
            return
        self.hub.later(self.LOOK_SECONDS, self._look)
        if self._on_disk() == self.identity:
            return
        try:
            sock = self._bind(self.path)
        except OSError as error:
            if self._trouble != error.strerror:
                self._trouble = error.strerror
                log.warning("the control socket %s has gone, and cannot be made anew: %s; "
                            "it is tried on", self.path, error.strerror or error)
            return
        self._unregister()
        hang_up(self.sock)
        self.sock, self.identity, self._trouble = sock, self._on_disk(), None
        self.hub.changed.add(self.hub)
        sock.setblocking(False)
        self.hub.selector.register(sock, READ, self)
        log.warning("the control socket %s had gone: made anew", self.path)

    def on_accepted(self, sock, peer):
        """Somebody asks."""
        Caller(self.hub, sock)

    def close(self):
        """Stop listening, leave no dead socket."""
        super().close()
        if self._on_disk() == self.identity:
            with contextlib.suppress(OSError):  # its folder may be gone
                os.unlink(self.path)


class Control(Survivor):
    """What admins ask, by the control socket or a signal."""

    SURVIVES = "maintenance",

    def __init__(self, hub):
        self.hub = hub
        self.maintenance = ""                   # what who waits is told besides, until it is back
        self.listener = None                    # a ControlListener, where there is one
        self.upgrade = None                     # Upgrade.begin
        self.pid = os.getpid                    # () -> the process that admins know

    def open(self, path):
        """Open the control socket. Where another HAS has it: OSError; else --status is off."""
        try:
            self.listener = ControlListener(self.hub, path)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            log.warning("no control socket at %s (%s): users are served, but --status and other "
                        "orders do not come in: mend control_socket, and start anew",
                        path, error.strerror or error)
        except AttributeError:
            log.warning("no control socket: this platform has no unix sockets")

    def close(self):
        if self.listener:
            self.listener.close()

    def collect(self, make, take):
        """Have take(status, made) called when make(status of a session) was called for all of them,
        in turns: there may be thousands."""
        made = []

        def add(session):
            made.append(make(session.status()))
        calls = [(add, (session,)) for session in self.hub.sessions.values()]
        self.hub.sweep([*calls, (lambda: take(self.status(), made), ())])

    def status(self):
        """What is told to admins, but of the sessions: plain values, without secrets."""
        hub = self.hub
        world, record, condition = hub.world, hub.record, hub.health.condition
        addresses, address, now = hub.settings.mush_address, hub.address, time.time()
        blind = world and world.blind and condition is Condition.UP
        sessions = hub.sessions.values()
        return {"version": VERSION, "pid": self.pid(), "worker": os.getpid(),
                "fronts": [front.pid for front in hub.fronts.all],
                "age": int(now - record.started),
                "started": record.started, "takeovers": record.takeovers,
                "fell_back": record.fell_back, "round_trip": record.round_trip,
                "returns": {"done": hub.history.returns, "failed": hub.history.failures},
                "bytes": {"in": record.bytes_in + sum(it.inbox.bytes_in for it in sessions),
                          "out": record.bytes_out + sum(it.screen.bytes_out for it in sessions)},
                "world": {"address": str(address), "family": world.dialect.name if world else None,
                          "health": "blind" if blind else condition.value,
                          "since": int(now - record.health_since),
                          "addresses": [str(each) for each in addresses],
                          "preferred": address == addresses[0],
                          "heartbeat": self._heartbeat_status(), "wanted": record.wish},
                "outages": {"count": record.outages,
                            "seconds": int(record.lost_seconds(condition)),
                            "last": int(now - record.last_outage) if record.outages else None},
                "maintenance": self.maintenance, "denied": hub.door.denials.in_force()}

    def _heartbeat_status(self):
        hub = self.hub
        record, settings = hub.record, hub.settings
        if hub.health.condition is Condition.SILENT:
            return f"no answer for {ago(time.time() - record.health_since + settings.hb_timeout)}"
        if not hub.is_up or hub.health.loss:
            return "away"
        where = (f"{settings.hb_user} {'at the login screen' if hub.world.blind else 'logged in'}"
                 if hub.world.dialect.logs_in else "connected, without a login")
        answers = f", answers in {record.round_trip * 1000:.1f} ms" if record.round_trip else ""
        return where + answers

    def command(self, request, answer):
        """Carry out a request, {"do": NAME, ...}; return what came of it, a dictionary, or None if
        answer() will be called with that (or its JSON): {"done": text}, or {"error": text,
        "status": of exit}."""
        does = {"status": lambda _: self._status(answer), "reload": self._reload,
                "history": lambda _: self.hub.history.told(),
                "upgrade": lambda _: self.upgrade(answer), "stop": lambda _: self._stop(answer),
                "notice": self._notice, "maintenance": self._maintenance,
                "kick": self._kick, "deny": self._deny}
        name = request.get("do")
        return does[name](request) if name in does else {
            "error": f"unknown request {name!r}: the HAS that runs is older than the one that asks"}

    def _status(self, answer):
        """{"do": "status"}: that of all sessions, too."""
        self.collect(json.dumps, lambda status, sessions: answer(
            f'{json.dumps(status)[:-1]}, "sessions": [{", ".join(sessions)}]}}'))

    def _reload(self, _):
        """{"do": "reload"}: what HUP does."""
        status, lines = self.hub.reload.run()
        return {"error" if status else "done": "\n".join(lines), "status": status}

    def _stop(self, answer):
        """{"do": "stop"}: what TERM does; the answer to that ends with this process."""
        names = [session.character.name for session in self.hub.sessions.values()]
        others = f"{names.count('')} without a login" if "" in names else ""
        who = ", ".join(filter(None, [*names, others]))
        answer({"done": f"saying goodbye to {users(len(names))}{f': {who}' if who else ''}"}, False)
        self.hub.stop()

    def _notice(self, request):
        """{"do": "notice", "text": ..., "to": ...}: write it to everybody, or to those."""
        text, to = printable(str(request["text"])), request.get("to")
        sessions = self._found(to) if to else list(self.hub.sessions.values())
        if to and not sessions:
            return {"error": f"nobody is here as {printable(to)}: see --status"}
        log.info("notice to %s: %s", printable(to) if to else "everybody", text)
        self.hub.sweep((session.screen.notify, (text,)) for session in sessions)
        return {"done": f"told {users(len(sessions))}"}

    def _found(self, who):
        """The sessions an admin means: of that number, else character, else address."""
        who = str(address_of(who)) if _is_numeric(who) else who
        sessions = self.hub.sessions.values()
        for name in map(operator.attrgetter, ("number", "character.name", "host")):
            found = [it for it in sessions if str(name(it)).lower() == who.lower()]
            if found:
                return found
        return []

    def _maintenance(self, request):
        """{"do": "maintenance", "text": ...}: what who waits is told besides; "off": no more."""
        text = printable(str(request["text"]))
        self.maintenance = "" if text.lower() == "off" else text
        log.info("maintenance: %s", text)
        if not self.maintenance:
            return {"done": "off"}
        if self.hub.health.condition is not Condition.DOWN:
            return {"done": "shown when the world is down, and until it is back"}
        self.hub.each("screen.notify", self.with_maintenance(""))
        return {"done": f"shown until the world is back; told {users(len(self.hub.sessions))}"}

    def with_maintenance(self, notice):
        """A notice to those who wait, and what the admin has said of the outage."""
        text = self.maintenance
        more = filled(self.hub.settings.maintenance_notice, text=text) if text else ""
        return "\n".join(filter(None, (notice, more)))

    def is_back(self):
        """The world is there again, so no maintenance is left."""
        if self.maintenance:
            log.info("maintenance: over, the world is back")
        self.maintenance = ""

    def _kick(self, request):
        """{"do": "kick", "who": ..., "reason": ...}: disconnect them."""
        who, reason = str(request["who"]), printable(request.get("reason") or "")
        sessions = [session for session in self._found(who)
                    if session.state is not State.CLOSING]
        if not sessions:
            return {"error": f"there is no {printable(who)}: see --status"}
        settings = self.hub.settings
        more = filled(settings.kick_reason_notice, reason=reason) if reason else ""
        notice = "\n".join(filter(None, (settings.kicked_notice, more)))
        why = f"kicked by an admin{f' ({reason})' if reason else ''}"
        for session in sessions:
            self.hub.safely(session.close, why, notice)
        return {"done": f"closed: {', '.join(map(str, sessions))}"}

    def _deny(self, request):
        """{"do": "deny", "address": ..., "seconds": ... or None}: nobody comes in; 0: again."""
        denials, seconds = self.hub.door.denials, request.get("seconds")
        network = _network(str(request["address"]))
        if seconds is not None:
            seconds = _number(0, 10 ** 12, float)(str(seconds))
        if seconds == 0:
            if not denials.lift(network):
                return {"error": f"{network} is not denied by --deny: see --status"}
            log.info("deny: %s may come in again", network)
            return {"done": f"{network} may come in again"}
        closed = denials.add(network, seconds)
        span = f"for {ago(seconds)}" if seconds else "until HAS stops"
        log.info("deny: nobody comes in from %s %s", network, span)
        return {"done": f"nobody comes in from {network} {span}; closed: {users(closed)}"}

    def log_status(self):
        """USR1: the status to the log."""
        self.collect(session_line, lambda status, lines: self.hub.sweep(
            (log.info, ("%s", line)) for line in status_lines(status) + listed(lines)))


def log_remarks(remarks):
    """What was noticed while reading the settings."""
    for remark in remarks:
        warning = remark.startswith("WARNING: ")
        level = logging.WARNING if warning else logging.INFO
        log.log(level, "%s", remark[9:] if warning else remark)


class Reload:
    """HUP: the log is opened anew, the settings read again; wrong ones change nothing."""

    def __init__(self, hub, load):
        self.hub = hub
        self._load = load                       # () -> (Settings, remarks)
        self.log = None                         # (settings): opens the log as they say; the trouble
        self._said = []                         # of one run()

    def run(self):
        """Do it; return what came of it: the exit status of --reload, and lines of text."""
        self._said, old = [], self.hub.settings
        trouble = self._open_log(old)           # first: logrotate waits for nobody's typing error
        try:
            settings, remarks = self._read()
        except (SettingsError, OSError) as error:
            for problem in getattr(error, "problems", [str(error)]):
                self._fail(problem)
            self._fail("HUP: the old settings stay in force; mend the above, then --reload (or "
                       "kill -HUP) again")
            return 2, self._said
        self._take(settings)
        remarks = [*remarks, *self._changes(old, settings)]
        log_remarks(remarks)
        if (old.log_file, old.log_level) != (settings.log_file, settings.log_level):
            trouble = self._open_log(settings)
        log.info("HUP: settings read")
        self._said += [trouble] if trouble else []
        return int(bool(self._said)), self._said + remarks + ["settings read"]

    def _fail(self, text):
        log.error("%s", text)
        self._said.append(text)

    def _open_log(self, settings):
        return self.log(settings) if self.log else ""

    def _read(self):
        settings, remarks = self._load()
        conf = self.hub.settings.conf
        if conf and not settings.conf:
            raise SettingsError([f"{conf}: sets nothing any more, or is not there, and settings in "
                                 "force are from it: put it back (only a new start goes without "
                                 "it)"])
        return settings, remarks

    def _take(self, settings):
        hub = self.hub
        hub.settings = hub.health.settings = settings
        hub.changed.add(hub)
        hub.places.look()
        try:
            hub.door.listen()
        except OSError as error:
            self._fail(f"HUP: cannot listen on {error.filename}: {error.strerror}; the old "
                       "listeners stay, the other settings are taken over")
        hub.door.denials.enforce()
        hub.fronts.look()
        hub.heartbeat.mailbox.post(hub.heartbeat.on_settings, settings)

    @staticmethod
    def _changes(old, settings):
        """More remarks: on what does not take effect at once."""
        for key, when in ("control_socket", "start only"), ("keeper", "start; auto: upgrade"):
            if getattr(old, key) != getattr(settings, key):
                yield f"WARNING: HUP: {key} takes effect at the next {when}"
        if old.mush_address != settings.mush_address:
            new = ", ".join(map(str, settings.mush_address))
            yield f"HUP: mush_address is now {new}; users move when it is confirmed"


class Hub(Loop):
    """All of HAS in the main thread: the loop, its rooms, and what passes between them.

    The heartbeat posts on_* and heard(); Health makes of it what is to be done, the _do_* do that.
    """

    def __init__(self, settings, load=None, clock=time.monotonic):
        super().__init__(clock)
        self.settings = settings
        self.sessions = {}                      # number -> Session, oldest first
        self.health = Health(settings, self._is_linked)
        self.record, self.history = Record(), History()
        self.door, self.logins, self.links = Door(self), LoginQueue(self), Links(self)
        self.control, self.reload = Control(self), Reload(self, load)
        self.places, self.hook, self.fronts = Places(self), Hook(self), Fronts(self)
        self.heartbeat = None
        self.scribe = None                      # who writes down what changes (Survival)
        self._untidy = 0                        # changes since garbage was searched for
        self.stopping = False

    def run(self):
        """Turn until stopped."""
        while not (self.stopping and not self.sessions and self.fronts.are_done):
            self.turn()

    def each(self, method, *arguments, but=lambda session: False):
        """Call a method of every session, oldest first, unless one has gone by then or is exempt
        (`but`); a fault in one ends only that one. Of many in turns: see sweep()."""
        sessions, method = list(self.sessions.values()), operator.attrgetter(method)
        self.sweep((method(session), arguments) for session in sessions
                   if session.number in self.sessions and not but(session))

    def write_down(self):
        """For the next process, if this one dies; when all change at once, not all in one turn."""
        some = [self] * (self in self.changed)      # what was ordered must not wait
        self.changed.discard(self)
        is_late = self._left or self._sweeps
        most = RECORDS_MEANWHILE if is_late else RECORDS_A_TURN
        some += [self.changed.pop() for _ in range(min(len(self.changed), most))]
        if self.scribe:
            self.scribe.write(some)
        else:
            self.changed.clear()
        self._untidy += RECORDS_A_TURN if is_late else len(some)
        if self._untidy >= UNTIDY:              # Python looks no sooner while old ones go as well
            self._untidy = 0
            gc.collect(0)

    # ---- what sessions ask

    @property
    def is_kept(self):
        """Whether what changes is written down."""
        return self.scribe is not None

    def catch(self, sock):
        """A client was accepted: as far as he knows he is connected."""
        if self.scribe:
            self.scribe.catch(sock)

    def keep(self, it):
        """A session, or the hub, that must not wait for the end of the turn to be written down."""
        if self.scribe:
            self.burden += 2
            self.changed.discard(it)
            self.scribe.write((it,), at_once=True)

    @property
    def is_up(self):
        """Whether links may be opened."""
        return self.health.is_up

    @property
    def world(self):
        """The World users are on, if one was found."""
        return self.health.world

    @property
    def offline_notice(self):
        """What users read when they lose the world, or come while it is away."""
        return self.control.with_maintenance(self.settings.offline_notice)

    @property
    def address(self):
        """Of the world users are on, or of the one that is looked for first."""
        return self.world.address if self.world else self.settings.mush_address[0]

    def connect(self, world, owner, on_data):
        """Begin to open a link to the world; OSError where that fails at once."""
        if world.tls is None:
            return Stream.connect(self.selector, world.target, owner, on_data)
        return self.fronts.newest().connect(world, owner, on_data)

    def stream_of(self, packed, take):
        """The stream of a process before this one that pack() gave so."""
        return Stream(self.selector, take(packed["fd"]), None, None,
                      far=self.fronts.far_end(packed.get("far")))

    def ask(self, session):
        """Why has this session's link ended? Answered by LEFT or DIED."""
        self.heard("ended", session.number, session.serial, session.life, session.who)

    def ask_whether_it_turns(self):
        """Has the world gone round once from now on? Answered by links.answered()."""
        self._post("on_ask", NOBODY, 0)

    def check(self, session, pairs):
        """Which of these pairs does the world take? Answered by session.on_checked."""
        if session.state in AWAY:
            self.links.choosing.add(session.number)
        self._post("on_check", session.number, session.serial, list(pairs))

    def forget(self, session):
        """A session has ended."""
        self.changed.add(session)
        if self.sessions.pop(session.number, None):
            self.later(FORGOTTEN_SECONDS, Passage(session).fall_apart)
            self.history.gone(session.number, "the client left")
            self.record.bytes_in += session.inbox.bytes_in
            self.record.bytes_out += session.screen.bytes_out
            if not self.places.remove(session):
                self.door.left(session)
            self.logins.forget(session)
            self.health.endings.forget(session.number)
            self.links.forget(session)

    # ---- what the heartbeat says

    def _post(self, method, *arguments):
        """Tell the heartbeat something."""
        self.heartbeat.mailbox.post(getattr(self.heartbeat, method), *arguments)

    def _is_linked(self):
        return any(session.linked for session in self.sessions.values())

    def heard(self, name, *arguments):
        """Something was heard of the world: do what Health makes of it."""
        before = self._known()
        effects = getattr(self.health, name)(*arguments, self.now)
        if before != self._known():
            self.changed.add(self)
        self.sweep((getattr(self, "_do_" + effect), values) for effect, *values in effects)

    def _known(self):
        health = self.health
        return health.condition, health.world, health.lost_at, health.silent_until

    def on_world_found(self, world):
        """The heartbeat confirmed a world: the one users are on, or another."""
        self.record.wish = None
        self.heard("found", world)

    def on_parked(self, parked):
        """What a new process would need of the heartbeat now, with a copy of its socket."""
        if self.scribe:
            self.scribe.park(parked)
        elif "connection" in parked:
            os.close(parked["connection"]["fd"])

    def on_wish(self, trouble):
        """What the settings ask for could not be had ("address: why"), or is tried anew (None)."""
        self.record.wish = trouble

    def on_answers(self, asks, life, seconds):
        """The world answered, within `seconds`, a probe sent after these links had ended."""
        self.record.round_trip = seconds
        self.heard("answered", asks, life)
        if any(number == NOBODY for number, _ in asks):
            self.links.answered()

    def on_checked(self, number, serial, verdicts):
        """The heartbeat's answer to check()."""
        self.links.choosing.discard(number)
        self.links.go_on()
        session = self.sessions.get(number)
        if session:
            self.safely(session.on_checked, serial, verdicts)

    # ---- what is to be done about it: the effects of Health

    @staticmethod
    def _do_say(level, text):
        log.log(level, "%s", text)

    def _do_later(self, seconds, event, *arguments):
        self.later(seconds, self.heard, event, *arguments)

    def _do_ask(self, number, serial):
        self._post("on_ask", number, serial)

    def _do_verdict(self, number, serial, left):
        session = self.sessions.get(number)
        if session and session.state is State.ASKING and session.serial == serial:
            self.safely(session.handle, Event.LEFT if left else Event.DIED)
            if session.state in AWAY and self.is_up:
                self.safely(session.handle, Event.RETRY)

    def _do_became(self, was, seconds):
        if was is Condition.DOWN and self.record.outages:
            log.info("the outage lasted %s; bringing back %s",
                     ago(time.time() - self.record.health_since), users(len(self.sessions)))
        self.record.became(was, self.health.condition, seconds)

    def _do_silence(self, silent):
        seconds = self.settings.hb_timeout
        if not silent:
            self.hook.back("it answers again")
        elif self.hook.last_event != "silent":  # a new process is told what is known
            self.hook.lost("silent", seconds, f"no answer for {seconds:g} s")
        self.each("hold.on_silence", silent)

    def _do_down(self, reason, died):
        log.warning("the world is down (%s): holding %s", reason, users(len(self.sessions)))
        since = self.record.health_since
        if self.control.maintenance:
            reason += f"; maintenance: {self.control.maintenance}"
        self.hook.lost("down", time.time() - since, reason)
        if self.world:                          # else none was found yet
            self.history.lost(since, reason, self._in_the_game())
        self._post("on_down")
        self.links.died(died)
        self.burden = BURDEN_A_TURN             # all that was work enough for a turn
        self.each("handle", Event.DOWN, self.offline_notice, but=self._is_in_it)

    def _is_in_it(self, session):
        """Whether the session has a link to a world that is up, in its present life."""
        return self.is_up and session.link and session.life == self.world.life

    def _start_time(self):
        return self.world.life.partition(" ")[2] or "start time unknown"

    def _do_found(self, lived_on, renewed):
        world = self.world
        log.log(logging.DEBUG if renewed else logging.INFO, "the world at %s %s%s: %s, %s%s",
                world.address, "lived on; the heartbeat is back" if lived_on else "is up",
                " (without heartbeat login)" if world.blind else "", world.dialect.name,
                self._start_time(),
                "" if world.blind or not world.dialect.logs_in else "; the heartbeat is logged in"
                + (" and may check passwords" if world.checks else ""))
        self.hook.found(world)

    def _do_moved(self, old):
        log.warning("the world moves from %s to %s: %s taken along", old.address,
                    self.world.address, users(len(self.sessions)))
        self.hook.moved(old.address)
        if not self.history.is_open:
            self.history.lost(time.time(), f"moved to {self.world.address}", self._in_the_game())
        self.links.clear()
        self.each("handle", Event.DOWN, self.settings.moved_notice)

    def _in_the_game(self):
        """Who has something to lose: {session number: name}."""
        return {session.number: printable(session.character.login.name)
                for session in self.sessions.values()
                if session.character.login and not session.character.is_guest
                and session.state is not State.CLOSING}

    def _do_reborn(self, died):
        log.warning("the world has been started anew: its users are brought back")
        self.hook.lost("down", self.now - died, "it was started anew")
        self.record.reborn(self.now - died)
        self.history.lost(time.time() - (self.now - died), "it was started anew",
                          self._in_the_game())
        self.links.died(died)
        self.each("handle", Event.DOWN, self.offline_notice, but=lambda session: not (
            session.link and session.life != self.world.life or session.state is State.ASKING))

    def _do_up(self, is_new_life):
        if is_new_life:
            self.control.is_back()
            self.history.found()
            self.hook.back(f"{self.world.dialect.name}, {self._start_time()}")
        self.links.found(is_new_life)
        self.each("handle", Event.RETRY)
        self.links.go_on()

    def _do_adopt(self, life):
        for session in self.sessions.values():
            if session.link:
                session.life = life
                self.changed.add(session)

    # ---- signals

    @staticmethod
    def on_stop_key():
        """TSTP, Ctrl-Z in the terminal: a stopped HAS would freeze every user."""
        log.warning("Ctrl-Z (TSTP): not obeyed, it would freeze every user; to have the terminal "
                    "back, start HAS under screen, tmux or nohup")

    def stop(self):
        """TERM, INT: say goodbye, flush, end."""
        if self.stopping:
            return
        self.stopping = True
        if self.scribe:
            self.scribe.farewell()              # before it is said: it may be killed just then
        log.info("stopping: saying goodbye to %s", users(len(self.sessions)))
        for listener in self.door.listeners:
            listener.close()
        self.control.close()
        self.fronts.stop()
        self._post("on_stop")
        self.each("close", "HAS stops", self.settings.goodbye_notice)
        flush = 2 * FLUSHED_SECONDS, self._end_flushed, self.now + GOODBYE_SECONDS
        self.sweep([(self.later, flush)])       # when all are told

    def _end_flushed(self, until):
        """End the sessions whose clients have been sent everything; at `until` all of them."""
        self.each("end", but=lambda session: session.client.out and self.now < until)
        self.sweep([(self._look_for_unflushed, (until,))])

    def _look_for_unflushed(self, until):
        if self.sessions:
            self.later(FLUSHED_SECONDS, self._end_flushed, until)


# ======================================================================
# 10. Survival
#
# A new process in place of this one, by the same or another program: where
# all that outlives a process is (Vault: Board, Records, Shelf), what that is
# (Survival), whether a program can take it over (Rehearsal), how it is
# replaced (Upgrade), and the processes that outlive it (Keeper, TLSFront).
# ======================================================================

SO_PEEK_OFF = getattr(socket, "SO_PEEK_OFF", 42)        # Linux 3.4 (socket(7)); Python lacks it


class Board:
    """One page that the processes share: bytes, and words of four, each changed by one store.

    Other programs read these places, older and newer ones: none ever changes its meaning.
    """

    LOG, SHELF, PROGRAM = range(3)              # bytes: which of two counts, of logs, shelves, ...
    TRIAL = 3                                   # 1: that program must still prove itself
    SERVING, FAREWELL, STATUS = 4, 5, 6         # 1: all is in the vault; see end(), its status
    FELL_BACK = 7                               # 1: another had to take that program's place
    WORKER, KEEPER, DEATHS, LAST = 16, 20, 24, 28       # words: two pids, deaths, the last's status
    NUMBER, BEAT = 32, 36                       # the next session's; counted up while it turns
    TAKING_UP, SUSPECT, STRIKES = 40, 44, 48    # a session; one at which several have died
    SIZE = 4096

    def __init__(self, fd):
        self._page = mmap.mmap(fd, self.SIZE)

    def __getitem__(self, place):
        return self._page[place]

    def __setitem__(self, place, value):
        self._page[place] = value

    def word(self, place):
        """The word that stands there."""
        return struct.unpack_from("<i", self._page, place)[0]

    def put(self, place, value):
        """Change a word."""
        struct.pack_into("<i", self._page, place, value)

    def close(self):
        """Look at it no more."""
        self._page.close()


class Records:
    """A log of records, each under a number: the last one counts; an empty one: it is gone.

    A death while writing costs the record being written at most: reading stops at the first that
    is cut off or wrong. There are two files: when the log has grown, what counts is copied to the
    other one, a part with each write, and one byte of the board says that this is now the log.
    """

    HEAD = struct.Struct("<III")                # length, CRC-32 (begun with the number), number
    SLACK, PART = 1 << 20, 1 << 17

    def __init__(self, board, files):
        self._board, self._files = board, files
        self.clear(False)

    def read(self):
        """{number: record}, of what has been written by whomever."""
        file, found, at = self._files[self._board[Board.LOG]], {}, 0
        data = read_memory_file(file)
        while at + self.HEAD.size <= len(data):
            length, check, number = self.HEAD.unpack_from(data, at)
            begin, end = at + self.HEAD.size, at + self.HEAD.size + length
            if end > len(data) or binascii.crc32(data[begin:end], number) != check:
                break
            found[number] = data[begin:end]
            self._note(number, at, end - at, length)
            at = end
        self._end = at
        os.ftruncate(file, at)
        return {number: record for number, record in found.items() if record}

    def _note(self, number, at, size, length):
        self._live -= self._places.pop(number, (0, 0))[1]
        if length:
            self._places[number] = at, size
            self._live += size

    def clear(self, truncate=True):
        """There are no records."""
        self._places, self._end, self._live = {}, 0, 0          # number -> (offset, size)
        self._copy, self._copied, self._left = {}, 0, None      # the same there; still to be copied
        for file in self._files * truncate:
            os.ftruncate(file, 0)

    def write(self, records):
        """Write {number: record}; OSError if there is no room, and nothing has changed."""
        pieces, places, size = [], {}, 0
        for number, record in records.items():
            check = binascii.crc32(record, number)
            pieces += [self.HEAD.pack(len(record), check, number), record]
            places[number] = size, self.HEAD.size + len(record)
            size += self.HEAD.size + len(record)
        data = b"".join(pieces)
        self._write(self._files[self._board[Board.LOG]], data, self._end)
        for number, (at, length) in places.items():
            self._note(number, self._end + at, length, len(records[number]))
        self._end += size
        try:
            self._renew(data, places)
        except OSError:                         # no room for two
            self._left = None
            raise

    @staticmethod
    def _write(file, data, at):
        if os.pwrite(file, data, at) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _renew(self, data, places):
        """Go on with the other file, where one is made: what was written goes there, too."""
        if self._left is not None:
            self._add_to_copy(data, places)
        elif self._end > self.SLACK + 3 * self._live:
            self._copy, self._copied, self._left = {}, 0, list(self._places)
            os.ftruncate(self._files[1 - self._board[Board.LOG]], 0)
        if self._left is not None:
            self._copy_some()

    def _add_to_copy(self, data, places):
        self._write(self._files[1 - self._board[Board.LOG]], data, self._copied)
        for number, (at, size) in places.items():
            self._copy[number] = self._copied + at, size
        self._copied += len(data)

    def _copy_some(self):
        """Copy what was not written anew meanwhile, a part of it; behind the last one the other
        file is the log."""
        this, pieces, places, size = self._board[Board.LOG], [], {}, 0
        while self._left and size < self.PART:
            number = self._left.pop()
            if number in self._places and number not in self._copy:
                at, length = self._places[number]
                pieces.append(os.pread(self._files[this], length, at))
                places[number] = size, length
                size += length
        self._add_to_copy(b"".join(pieces), places)
        if not self._left:
            self._board[Board.LOG] = 1 - this
            self._places = {number: self._copy[number] for number in self._places}
            self._end, self._left, self._copy = self._copied, None, {}
            os.ftruncate(self._files[this], 0)


def _too_many_in_flight():
    """A new one each time: an exception that is raised again keeps what it has passed before."""
    return OSError(errno.ETOOMANYREFS, "more sockets would be in flight than files may be open: "
                   "raise the hard limit (ulimit -Hn)")


def _is_limit(error):
    """Whether more sockets are in flight than this user may have (RLIMIT_NOFILE)."""
    return error.errno == errno.ETOOMANYREFS


class Shelf:
    """Sockets as messages in flight between the two ends of a socketpair (SCM_RIGHTS, unix(7)):
    each lives as long as somebody has that pair, whoever it is.

    A message has their names, numbers that are never used again. New ones come one at a time into
    a pair of their own; when these are many, they join the old ones in one of two other pairs, many
    in a message. When many of those are dead, all that count go to the other of the two, a message
    at a time, and one byte of the board says that this now counts. Reading changes nothing.
    """

    BATCH = 250                                 # in one message; the kernel takes 253 (SCM_MAX_FD)
    YOUNG = 2 * BATCH

    def __init__(self, board, pairs):
        self._board, (self._new, *self._old) = board, pairs
        self._socks, self._names = {}, {}       # name -> socket, and back: objects, not numbers
        self._last_name, self._dead = 0, 0
        self._young = []                        # names that are in the new pair
        self._coming, self._renewal = [], None  # to the other pair: names still to go; the steps
        self._left = set()                      # names that were read and not taken yet

    def name(self, sock):
        """The name under which another process finds this socket; OSError if it cannot."""
        if sock not in self._names:
            self._last_name += 1
            self._socks[self._last_name], self._names[sock] = sock, self._last_name
            try:
                self._add(self._last_name)
            except OSError:
                self.drop(sock)
                raise
            if sock not in self._names:
                raise _too_many_in_flight()
            self._go_on()
        return self._names[sock]

    def _add(self, name):
        self._young.append(name)
        if self._renewal:
            self._coming.append(name)
        try:
            self._send(self._new, [name])
            if len(self._young) >= self.YOUNG:
                self._join()
        except OSError as error:
            if _is_limit(error) and not (self._dead or self._renewal):
                raise _too_many_in_flight() from None
            if not (isinstance(error, BlockingIOError) or _is_limit(error)):
                raise
            if _is_limit(error):
                self._renew()
            else:
                self._join()

    def _join(self):
        """The new ones join the old."""
        try:
            self._fill(self._old[self._board[Board.SHELF]], self._young)
        except OSError:                         # no room, or too many for a moment
            self._renew()
        self._drain(self._new)
        self._young = []

    def drop(self, sock):
        """No other process will ask for this socket."""
        name = self._names.pop(sock, None)
        if name:
            del self._socks[name]
            self._dead += 1

    def tidy(self, at_once=False):
        """Let go of what was dropped, once that is worth it; `at_once`: now, else step by step."""
        if at_once and self._renewal:
            self._renew()
        if self._dead > (0 if at_once else len(self._socks) + 200):
            self._renewal = self._renewal or self._renew_in_steps()
            if at_once:
                self._renew()
        self._go_on()

    def _go_on(self):
        """The next step, if there is one."""
        if self._renewal and next(self._renewal, self) is self:
            self._renewal = None

    def _renew(self):
        """All steps."""
        steps, self._renewal = self._renewal or self._renew_in_steps(), None
        for _ in steps:
            pass

    def _send(self, pair, names):
        socks = [self._socks[name] for name in names]
        rights = struct.pack(f"{len(socks)}i", *(sock.fileno() for sock in socks))
        pair[0].sendmsg([" ".join(map(str, names)).encode()],
                        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_DONTWAIT)

    def _renew_in_steps(self):
        """Have what counts, and nothing else, in flight in the other pair of the two old ones."""
        this = self._board[Board.SHELF]
        other, self._coming, self._dead = self._old[1 - this], list(self._socks), 0
        self._drain(other)
        while self._coming:
            some = self._coming[:self.BATCH]
            del self._coming[:self.BATCH]
            try:
                self._fill(other, some)
            except OSError as error:
                if not _is_limit(error):
                    raise
                # An ordinary user may have no more in flight than open: for a moment there are none
                for pair in [self._new, *self._old]:
                    self._drain(pair)
                self._fill(other, list(self._socks), as_far_as_it_goes=True)
                self._coming = []
            yield
        self._board[Board.SHELF] = 1 - this
        self._drain(self._new)
        self._young = []
        while self._let_go(self._old[this]):
            yield

    def _fill(self, pair, names, as_far_as_it_goes=False):
        """Put in those of `names` that are still open."""
        names = [name for name in names if name in self._socks]
        for name in [name for name in names if self._socks[name].fileno() < 0]:
            self.drop(self._socks[name])
            names.remove(name)
        for start in range(0, len(names), self.BATCH):
            batch = names[start:start + self.BATCH]
            try:
                self._send(pair, batch)
            except OSError:
                if not as_far_as_it_goes:
                    raise
                for name in batch:
                    self.drop(self._socks[name])

    @staticmethod
    def _drain(pair):
        while Shelf._let_go(pair):
            pass

    @staticmethod
    def _let_go(pair):
        """Drop a message; whether there was one."""
        try:
            return bool(pair[1].recv(1, socket.MSG_DONTWAIT))   # no room for descriptors: the
        except BlockingIOError:                                 # kernel closes them
            return False

    def read(self):
        """Open all that is in flight, for take(); False: some could not be opened."""
        this, fds, cut = self._board[Board.SHELF], {}, False
        self._drain(self._old[1 - this])
        for pair in self._old[this], self._new:
            for data, rights, flags in self._peek(pair[1]):
                names = list(map(int, data.split()))
                self._young += names * (pair is self._new)
                for name, fd in zip(names, struct.unpack(f"{len(rights) // 4}i", rights)):
                    if name in fds:
                        os.close(fd)            # a death in the middle of _renew()
                    else:
                        fds[name] = fd
                cut = cut or flags & socket.MSG_CTRUNC
        for name, fd in sorted(fds.items()):
            sock = self._socks[name] = socket.socket(fileno=fd)
            self._names[sock], self._last_name = name, name
        self._left = set(fds)
        return not cut

    def _peek(self, sock):
        """The messages that wait: (data, descriptors, flags)."""
        room = socket.CMSG_SPACE(4 * self.BATCH)
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        try:
            while True:
                data, control, flags, _ = sock.recvmsg(
                    1 << 16, room, socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                yield data, control[0][2] if control else b"", flags
        except BlockingIOError:
            pass
        finally:
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)

    def take(self, name):
        """The socket of that name, once; KeyError if there is none."""
        self._left.remove(name)
        return self._socks[name]

    def leave(self):
        """Nobody will take() any more. What was not taken is returned: what had ended, second
        copies, and perhaps clients that had just been accepted."""
        left, self._left = [self._socks[name] for name in self._left], set()
        for sock in left:
            self.drop(sock)
        self.tidy(at_once=True)
        return left

    def clear(self):
        """Nothing is in flight any more."""
        self._socks, self._names, self._dead = {}, {}, 0
        self._young, self._renewal = [], None
        for pair in [self._new, *self._old]:
            self._drain(pair)


class Vault:
    """What keeps everything alive without any code that runs: eleven descriptors. Whoever holds
    them, a new process goes on from them. Main thread only.

    The board; two logs of records; two programs, the one that runs and the one before or after
    it; three pairs of sockets with all others in flight. Record 0 is the hub's.
    """

    STRIKES = 3
    ADDITIONS = 1 << 31                         # from this number on they add to another record

    def __init__(self, fds, link=()):
        self.fds, self.link = tuple(fds), tuple(link)           # link: between worker and keeper
        self.board = Board(fds[0])
        self.records, self._programs = Records(self.board, fds[1:3]), fds[3:5]
        self._ends = [socket.socket(fileno=fd) for fd in fds[5:]]
        for sock in self._ends[::2]:            # as much room as the system allows
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.shelf = Shelf(self.board, list(zip(self._ends[::2], self._ends[1::2])))
        self.take, self.left = self.shelf.take, []          # left: sockets that nobody took
        self.additions, self.next_addition = [], self.ADDITIONS     # found; to be written
        self._be_inherited(False)

    @classmethod
    def make(cls):
        """A new one, empty; OSError if it cannot be had."""
        fds = []
        try:
            for _ in range(5):
                fds.append(os.memfd_create("has"))
            os.ftruncate(fds[0], Board.SIZE)
            for _ in range(3):
                fds += [sock.detach() for sock in
                        socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        return cls(fds)

    END, LEAVE = 1, 2                           # on the board: FAREWELL

    def end(self, status):
        """This process ends as it should: nobody need go on."""
        self.board[Board.STATUS] = status
        self.board[Board.FAREWELL] = self.END

    @property
    def program(self):
        """The descriptor of the program that goes on."""
        return self._programs[self.board[Board.PROGRAM]]

    def holds(self, source):
        """Whether this is the program that goes on."""
        return read_memory_file(self.program) == source

    def close(self):
        """Hold it no more."""
        self.board.close()
        for sock in self._ends:
            sock.close()
        for fd in self.fds[:5]:
            os.close(fd)

    def _be_inherited(self, inherited):
        for fd in self.fds + self.link:
            os.set_inheritable(fd, inherited)

    # ---- what is in it

    def store(self, state):
        """Put in what Survival.pack() gave."""
        records = {packed["values"]["number"]: packed for packed in state["sessions"]}
        self.write({0: {**state, "sessions": None}, **records})

    def write(self, values):
        """Write records, of plain values or JSON; what is None is gone."""
        self.records.write({number: b"" if it is None else it if isinstance(it, bytes) else
                            json.dumps(it).encode() for number, it in values.items()})

    def load(self):
        """What store() was given, by whomever; see take()."""
        records = {number: json.loads(it.decode()) for number, it in self.records.read().items()}
        if not self.shelf.read():
            log.error("some connections could not be taken over: more files are open than the "
                      "system allows: raise the limit (ulimit -n)")
        self.additions = sorted(number for number in records if number >= self.ADDITIONS)
        for number in self.additions:
            self.count_addition(number)
            self._add(records.pop(number), records)
        hub, poison = records.pop(0), self._poison()
        if records.pop(poison, None):
            log.error("session %d is given up: HAS has died %d times in a row while it took it up",
                      poison, self.STRIKES)
        newest = max(hub["next_number"], self.board.word(Board.NUMBER))
        return {**hub, "next_number": newest, "sessions": list(records.values())}

    def count_addition(self, number):
        """There is one with this number: the next has another."""
        self.next_addition = self.ADDITIONS + (number + 1) % self.ADDITIONS

    @staticmethod
    def _add(addition, records):
        """What one who is away has missed since his record was written (Draft.addition)."""
        client = records.get(addition["of"], {}).get("client") or {}
        if client.get("count") == addition["from"]:
            client.setdefault("more", []).append(addition["text"])
            client["count"] += len(unpack(addition["text"]))

    def take_up(self, number):
        """This session is being taken up (0: none any more): who dies then has perhaps died of
        it."""
        self.board.put(Board.TAKING_UP, number)

    def _poison(self):
        """The number of a session that kills whoever takes it up, or -1. Once may be chance, twice,
        too; a kill is no sign at all."""
        board = self.board
        number, status = board.word(Board.TAKING_UP), board.word(Board.LAST)
        board.put(Board.TAKING_UP, 0)
        if status == -signal.SIGKILL:
            return -1
        again = number and number == board.word(Board.SUSPECT)
        board.put(Board.STRIKES, board.word(Board.STRIKES) + 1 if again else int(number > 0))
        board.put(Board.SUSPECT, number)
        return number if number and board.word(Board.STRIKES) >= self.STRIKES else -1

    def clear(self):
        """Nothing is kept now, but the programs."""
        self.records.clear()
        self.shelf.clear()

    # ---- the program that goes on from it

    def install(self, source, trial=True):
        """This program goes on; the one before it again, if it fails while on `trial`."""
        other = 1 - self.board[Board.PROGRAM]
        with open(self._programs[other], "wb", closefd=False) as file:
            file.truncate(0)
            file.seek(0)
            file.write(source)
        self.board[Board.TRIAL] = self.board[Board.FELL_BACK] = 0
        self.board[Board.PROGRAM] = other
        self.board[Board.TRIAL] = int(trial)

    def fall_back(self):
        """The program on trial has failed: the one before it is next; False if none is on trial."""
        on_trial = self.board[Board.TRIAL]
        if on_trial:
            self.board[Board.TRIAL] = 0
            self.board[Board.PROGRAM] ^= 1
            self.board[Board.FELL_BACK] = 1
        return bool(on_trial)

    @property
    def fell_back(self):
        """Whether the program that runs is the one before another that has failed."""
        return bool(self.board[Board.FELL_BACK])

    @property
    def is_last(self):
        """Whether no other program could do better than the one that runs."""
        return not self.board[Board.TRIAL]

    def go_back(self, arguments):
        """The new program has failed: execute the one before it; returns if there is none."""
        if self.fall_back():
            log.exception("the new program could not take over: the old one goes on")
            self.execute(arguments)

    def keep(self, source):
        """Nothing can fail any more: the Vault to go on with."""
        self.left = self.shelf.leave()
        return self

    def prove(self):
        """The program has served long enough: it is on trial no more."""
        self.board[Board.TRIAL] = 0

    def command(self, arguments):
        """What starts the program, to go on from this vault."""
        return [sys.executable, memory_path(self.program), *arguments,
                "--vault", ",".join(map(str, self.fds))]

    def execute(self, arguments):
        """Replace this process by the program; OSError if that cannot be."""
        self._be_inherited(True)
        try:
            link = ["--link", ",".join(map(str, self.link))] if self.link else []
            os.execv(sys.executable, self.command(arguments) + link)
        finally:
            self._be_inherited(False)


@functools.lru_cache(None)
def why_no_vault():
    """Why nothing can be kept for another process here; "" where it can."""
    if not MEMORY_FILES:
        return "this platform has no memory files (memfd_create, /proc)"
    try:
        with contextlib.closing(Vault.make()) as vault:
            with socket.socket() as sock:
                vault.take(vault.shelf.name(sock) * vault.shelf.read()).close()
        return ""
    except (OSError, AttributeError, KeyError) as error:
        return f"this platform cannot keep sockets in flight ({error!r})"


def ignore_terminal():
    """Let no terminal stop this process: Ctrl-Z, or a line of log where `stty tostop` holds."""
    for name in ("SIGTSTP", "SIGTTOU", "SIGTTIN"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


# Signals that wait while one program takes over from another.
HELD_BACK = {getattr(signal, name) for name in (
    "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT", "SIGCHLD", "SIGTSTP", "SIGQUIT")
    if hasattr(signal, name)}


def pack_world(world):
    """A World as plain values; its Recipe of TLS is made anew of the settings."""
    return world and {**world._asdict(), "address": str(world.address),
                      "target": pack(world.target), "dialect": world.dialect.name,
                      "tls": world.tls is not None}


def unpack_world(packed, settings):
    """The World that pack_world() was given; what an older program did not know has its default."""
    known = {name: packed[name] for name in World._fields if name in packed}
    family, target = unpack(packed["target"])
    tls = settings.recipes["world"] if packed.get("tls", settings.mush_ssl) else None
    return World(**{**known, "address": parse_address(packed["address"]),
                    "dialect": DIALECTS[packed["dialect"]], "tls": tls,
                    "target": (socket.AddressFamily(family), target),
                    "word": packed.get("word", settings.remotehostname_cmd)})


def take_or_ended(take, name):
    """take(name); where there is none, for the socket had ended before that was written down, or
    this is a rehearsal: another one that has ended."""
    try:
        return take(name)
    except KeyError:
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours


class Survival(Survivor):
    """What a new process takes over of this one, as plain values and open descriptors.

    The new one makes a Hub, then unpack()s, then, when nothing can fail any more, go_on().
    """

    SURVIVES = "rescues",

    def __init__(self, hub, vault=None):
        self.hub, self.vault = hub, vault
        self.guard = None                       # a Guard, where there is a keeper
        self.take_up_now = lambda number: None  # told which session is being taken up
        self.rescues = []                       # times of them (Upgrade)
        self._has_lost_listeners = False

    def _rooms(self):
        """Whose SURVIVES are packed together: no name stands in two of them."""
        hub = self.hub
        return (self, hub.record, hub.health, hub.links, hub.logins, hub.hook, hub.control,
                hub.door.denials, hub.history, hub.fronts)

    def pack(self, name, going=False):
        """Everything a new process needs, as plain values; `name` as for Stream.pack(). Disturbs
        nothing here; when we are `going`, a session that cannot be packed ends, rather than all."""
        return {**self.pack_hub(name), "sessions": list(self._pack_sessions(name, going))}

    def pack_hub(self, name):
        """The same, without the sessions."""
        hub, settings = self.hub, self.hub.settings
        listeners = [{"fd": name(it.sock), "tls": it.tls, "wanted": list(it.wanted)}
                     for it in hub.door.listeners if not it.closed]     # as when HAS stops
        it = hub.control.listener
        control = it and not it.closed and {
            "fd": name(it.sock), "path": it.path, "identity": pack(it.identity)}
        values = {key: it for room in self._rooms() for key, it in room.survivors().items()}
        return {"format": 2, "version": VERSION, "settings": settings.texts,
                "files": pack(settings.files), "conf": settings.conf,
                "listeners": listeners, "control": control, "fronts": hub.fronts.pack(name),
                "world": pack_world(hub.world),
                "health": hub.health.condition.name, "next_number": hub.door.next_number,
                "values": {**values, "_lost_at": self._lost_at()}}

    def _pack_sessions(self, name, going):
        for session in list(self.hub.sessions.values()):
            try:
                yield Passage(session).pack(name)
            except Exception:
                if not going:
                    raise
                self.hub.fault(session)

    def _lost_at(self):
        """When users lost the world: by the wall clock, so it was always packed."""
        lost_at = self.hub.health.lost_at
        return None if lost_at is None else time.time() - (self.hub.now - lost_at)

    def unpack(self, state, take, whole=True):
        """Take up what pack() of another process gave; nothing is sent or closed yet (see go_on).

        `take` gives the socket of a name. `whole`: a session that cannot be taken up is an
        exception; else, for no other program could do better, it ends.
        """
        hub, values, take = self.hub, state["values"], functools.partial(take_or_ended, take)
        for room in self._rooms():
            room.take_up(values)
        if values.get("_lost_at") is not None:
            hub.health.lost_at = hub.now - (time.time() - values["_lost_at"])
        hub.health.condition = Condition[state["health"]]
        hub.health.world = state["world"] and unpack_world(state["world"], hub.settings)
        hub.door.next_number = state["next_number"]
        hub.fronts.unpack(state.get("fronts", ()), take)
        hub.door.listeners = list(self._listeners(state["listeners"], take))
        control = state["control"]
        if control:
            hub.control.listener = ControlListener(hub, control["path"], take(control["fd"]),
                                                   unpack(control.get("identity")))
        for packed in state["sessions"]:
            try:
                self.take_up_now(packed["values"]["number"])
                self._unpack_session(packed, take)
            except Exception as error:
                number = (packed.get("values") or {}).get("number")
                log.exception("session %s could not be taken over", number)
                if whole:
                    raise RuntimeError("a session could not be taken over") from error
                self._close_packed(packed, number, take)

    def _listeners(self, packed, take):
        """Those that still listen: a process may have died in closing one."""
        for it in packed:
            sock = take(it["fd"])
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield Listener(self.hub, sock, it["tls"], tuple(it["wanted"]))
            else:
                sock.close()
                self._has_lost_listeners = True

    def _unpack_session(self, packed, take):
        hub, values = self.hub, packed["values"]
        number, host, tls = values["number"], values["host"], values.get("tls", False)
        client = (Absent(hub.settings.reattach_limit, hub.places, number)
                  if packed["client"]["fd"] is None else hub.stream_of(packed["client"], take))
        session = hub.door.enter(number, client, host, tls)
        Passage(session).unpack(packed, take)

    def _close_packed(self, packed, number, take):
        """Forget the session that was packed so, however far it was unpacked; close what it had."""
        session = self.hub.sessions.get(number)
        try:
            if session:
                session.end()
        except Exception:                       # half of it may be missing
            log.exception("%s could not be ended in order", session)
            self.hub.sessions.pop(number, None)
        for stream in filter(None, (packed.get("client"), packed.get("link"))):
            with contextlib.suppress(OSError, KeyError, TypeError):        # taken, and closed
                hang_up(take(stream["fd"]))

    def go_on(self, parked=None):
        """After unpack(), or where no new process could be made: begin anew what was under way.

        `parked`: what the heartbeat has left for its successor (Heartbeat.parked).
        """
        hub = self.hub
        hub.fronts.go_on()
        if "connection" not in (parked or {}):
            hub.heard("lost", "it could not be handed over", False)
        hub.heard("go_on")
        hub.hook.go_on()
        if self._has_lost_listeners:
            hub.door.listen_again()
        if hub.links.noise:
            hub.links.prune_noise()
        self._mend_history()
        for session in list(hub.sessions.values()):
            self.take_up_now(session.number)
            hub.safely(Passage(session).go_on)
        self.take_up_now(0)
        self._let_in(self.vault.left if self.vault else [])

    def _mend_history(self):
        """Who came back or left when the process before had no time any more to note that."""
        sessions, history = self.hub.sessions, self.hub.history
        for number in list(history.missing):
            session = sessions.get(number)
            if session is None:
                history.gone(number, "the client left")
            elif session.state is State.PLAYING and not has_ended(session.link.sock):
                history.returned(number)

    def _let_in(self, socks):
        """Clients that were accepted by a process which died before it knew them."""
        ports = {it.sock.getsockname()[1]: it for it in self.hub.door.listeners if not it.tls}
        for sock in socks:
            try:
                listener = ports.get(sock.getsockname()[1])
                if listener and not has_left(sock):
                    listener.on_accepted(sock, sock.getpeername())
                    continue
            except (OSError, IndexError, TypeError):
                pass                            # it is no such socket, or has ended
            sock.close()


def tell_systemd(text, fds=()):
    """Tell the service manager something, if one listens (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
            try:
                sock.sendmsg([text.encode()], rights if fds else [], 0,
                             "\0" + path[1:] if path.startswith("@") else path)
            except OSError as error:
                log.warning("cannot notify systemd: %s", error)


class Store:
    """The descriptor store of systemd (FDSTORE in sd_notify(3)), in place of a keeper: it holds the
    vault while the service is started anew, and needs nothing else of it."""

    NAME = "has-%d"
    COUNT = 11

    @staticmethod
    def is_there():
        """Whether the unit has one. Before version 254 systemd does not say; the unit can."""
        return bool(os.environ.get("NOTIFY_SOCKET") and os.environ.get("FDSTORE", "0") != "0")

    @classmethod
    def put(cls, vault):
        """Have the vault outlive this process."""
        for number, fd in enumerate(vault.fds):
            tell_systemd(f"FDSTORE=1\nFDPOLL=0\nFDNAME={cls.NAME % number}", [fd])

    @classmethod
    def take(cls):
        """The descriptors of the vault that an earlier process has put there, or None."""
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            return None
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        fds = {name: 3 + number for number, name in enumerate(names)}
        found = [fds.get(cls.NAME % number) for number in range(cls.COUNT)]
        return None if None in found else found

    @classmethod
    def clear(cls):
        """What is in it is of no use: equal names would be doubled, and ports be in use."""
        for number in range(cls.COUNT if cls.is_there() else 0):
            tell_systemd(f"FDSTOREREMOVE=1\nFDNAME={cls.NAME % number}")


class Scribe:
    """Writes into the vault, turn by turn, what has changed, so that a process that dies suddenly
    costs nobody his session. What waits to be sent is not written down: it would be sent twice.
    What the system allows no more cannot be kept so.
    """

    LOOK_SECONDS, BEAT_SECONDS = 10, 2
    # What was written before does as well: the next process finds the link ended, or opens one.
    PASSING = {State.OPENING} | COMING_BACK

    def __init__(self, survival):
        self._survival, self.hub, self._vault = survival, survival.hub, survival.vault
        self._drafts, self._socks = {}, {}      # number -> what was written of it, and put in
        self._parked = self._parted = None      # of the heartbeat: plain values, and a socket; the
        self._told = False                      # one before

    def begin(self, parked):
        """Write down all there is, as what has `parked` is known to it."""
        self.park(parked)
        self.write([self.hub, *self.hub.sessions.values()], at_once=True)
        self._vault.board[Board.SERVING] = 1
        self._vault.write(dict.fromkeys(self._vault.additions))
        self.hub.later(self.LOOK_SECONDS, self._look)
        self._beat()

    def _beat(self):
        """The main loop turns, for who watches it."""
        self._vault.board.put(Board.BEAT, (self._vault.board.word(Board.BEAT) + 1) % (1 << 31))
        if os.environ.get("WATCHDOG_USEC"):
            tell_systemd("WATCHDOG=1")
        self.hub.later(self.BEAT_SECONDS, self._beat)

    def _look(self):
        """Now and then: what changes with the time."""
        self.hub.later(self.LOOK_SECONDS, self._look)
        self.hub.changed.add(self.hub)

    def farewell(self):
        """Nobody is to go on, however this process ends."""
        self._vault.end(0)

    def park(self, parked):
        """What a new process would need of the heartbeat now, with a socket of our own."""
        old, self._parked = self._parked, dict(parked or {})
        connection = self._parked.get("connection")
        if connection:
            sock = connection["fd"]
            sock = socket.socket(fileno=sock) if isinstance(sock, int) else sock
            self._parked["connection"] = {**connection, "fd": sock}
        if old and "connection" in old:
            self._parted = old["connection"]["fd"]
            self._parted.close()                # the heartbeat has ended it, or goes on with it
        self.hub.changed.add(self.hub)

    def catch(self, sock):
        """Have this socket, of which nothing is known yet, outlive us."""
        try:
            self._vault.shelf.name(sock)
        except OSError as error:
            self._complain(error)

    def write(self, changed, at_once=False):
        """Write down what is new of these sessions, or of the hub."""
        records = {}
        for it in changed:
            try:
                if it is self.hub:
                    records[0] = self._of_hub()
                elif it.number in self.hub.sessions:
                    self._note(it, records, at_once)
                elif it.number in self._drafts:
                    self._put(self._drafts.pop(it.number), it.number, None, records)
                else:
                    self._vault.shelf.drop(it.client.sock)
            except OSError as error:
                self._complain(error)
            except Exception:
                log.exception("%s: a fault of HAS in writing it down; HAS goes on", it)
        try:
            if records:
                self._vault.write(records)
                self._let_go(records)
        except OSError as error:
            for it in changed:                  # all of it the next time
                if it is not self.hub:
                    self._drafts.pop(it.number, None)
            self._complain(error)

    @staticmethod
    def _put(draft, number, record, records):
        """This record stands for what was added to the one before, too."""
        records[number] = record
        records.update(dict.fromkeys(draft.added))
        draft.added.clear()

    def _is_known(self, session, draft):
        """Whether what was written before does as well, or what a socket says that was accepted."""
        return (session.state in self.PASSING and session.client.sock and not session.inbox.kept
                and (draft or not session.hold.told))

    def _note(self, session, records, at_once):
        draft = self._drafts.get(session.number)
        if draft is None:
            self._vault.board.put(Board.NUMBER, self.hub.door.next_number)
        if not at_once and self._is_known(session, draft):
            return
        if draft is None:
            draft = self._drafts[session.number] = Draft(session)
        record = draft.update(self._vault.shelf.name)
        if record:
            self._put(draft, session.number, record, records)
            return
        number = self._vault.next_addition
        record = draft.addition(number)
        if record:
            records[number] = record
            self._vault.count_addition(number)

    def _of_hub(self):
        name, parked = self._vault.shelf.name, self._parked
        if parked and "connection" in parked:
            connection = parked["connection"]
            parked = {**parked, "connection": {**connection, "fd": name(connection["fd"])}}
        return {**self._survival.pack_hub(name), "heartbeat": parked}

    def _let_go(self, records):
        """No record names these sockets any more."""
        for number in records:
            gone = [sock for sock in self._socks.pop(number, ()) if sock.fileno() < 0]
            for sock in gone:
                self._vault.shelf.drop(sock)
            socks = self._socks_of(number)
            if socks:
                self._socks[number] = socks
            is_port = not number and any(sock is not self._parted for sock in gone)
            self._vault.shelf.tidy(at_once=is_port)     # it is to be free for others

    def _socks_of(self, number):
        """All sockets that a record may name."""
        hub = self.hub
        if number:
            session = hub.sessions.get(number)
            streams = (session.client, session.link) if session else ()
            return [it.sock for it in streams if it and it.sock]
        connection = (self._parked or {}).get("connection")
        socks = [it.sock for it in [*hub.door.listeners, hub.control.listener] if it]
        socks += [it.channel.sock for it in hub.fronts.all]
        return socks + ([connection["fd"]] if connection else [])

    def rewrite(self):
        """Something else was written: all of it again."""
        self._drafts.clear()
        self.write([self.hub, *self.hub.sessions.values()], at_once=True)

    def _complain(self, error):
        if not self._told:
            self._told = True
            log.error("not all users would outlive a sudden death of HAS: %s; all else goes on; if "
                      "it is too many files open or in flight: raise the limit (ulimit -n)",
                      error.strerror or error)


def proof_of_rehearsal(nonce, sessions):
    """What a program says that took over so many sessions from a state that holds this nonce."""
    return f"HAS took over {sessions} sessions: {nonce}\n".encode()


class Rehearsal:
    """A child that restores a copy of the real state, all but its sockets, with a new program,
    while nobody waits for it.

    The program may be any file: only one that says the nonce in the state, and how many sessions it
    has restored from it, has proved that it can take over. `done(trouble)` is called at its end,
    with why it has failed or "".
    """

    SECONDS, LOOK_SECONDS = 20, 0.02

    def __init__(self, survival, program, arguments, done):
        self.hub, self._done, self._said, self._over = survival.hub, done, b"", False
        nonce, names = secrets.token_hex(16), itertools.count(1)
        with contextlib.closing(Vault.make()) as vault:     # its own: ours is not to be disturbed
            state = survival.pack(lambda sock: next(names))     # no sockets: see take_or_ended
            self._proof = proof_of_rehearsal(nonce, len(state["sessions"]))
            vault.store({**state, "nonce": nonce})
            vault.install(program)
            self._start(vault, arguments)
        self.hub.later(self.SECONDS, self.end)

    def _start(self, vault, arguments):
        ours, theirs = socket.socketpair()
        self._output = Stream(self.hub.selector, ours, self, self._on_output)
        try:
            with theirs:
                self._child = subprocess.Popen(
                    vault.command(arguments) + ["--rehearse"], pass_fds=vault.fds,
                    stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
        except BaseException:
            self._output.drop()
            raise

    def _on_output(self, data):
        self._said = (self._said + data)[-4000:]

    def end(self):
        """Its time is over."""
        if not self._over:
            self._child.kill()
            self._output.drop()
            self._judge()

    on_error = end                              # a fault of HAS while listening (it was logged)

    def on_stream_end(self, stream, reason):
        """Its output has ended."""
        stream.drop()
        self._judge()

    def _judge(self):
        status = self._child.poll()
        if status is None:
            self.hub.later(self.LOOK_SECONDS, self._judge)  # its output ends just before it does
        elif not self._over:
            self._over = True
            self._done(self._trouble(status))

    def _trouble(self, status):
        if status == 0 and self._proof in self._said:
            return ""
        why = f"status {status}" if status else (
            "it ended without a proof that it had taken over the sessions: it is empty, cut off, "
            "older than the one that runs, or another program")
        said = self._said.decode("utf-8", "replace").splitlines()[-12:]
        return "\n".join([why + (". It said:" if said else ""),
                          *(f"    {printable(line)}" for line in said)])


class Upgrade:
    """Replaces the running program by the has.py on disk, in the same process, all connected.

    USR2 -> has.py is read, once: what is rehearsed is what will run
         -> Rehearsal
         -> the heartbeat parks, all goes into the vault -> exec.
    A new program that fails in its first TRIAL_SECONDS has the old one executed again, which the
    vault keeps beside it.
    """

    ARRIVAL_SECONDS, LOOK_SECONDS, RESCUES, RESCUE_SECONDS = 3, 0.05, 3, 600
    AGAIN_SECONDS = 5                           # between looks at a program that could not go on
    TRIAL_SECONDS = 60

    def __init__(self, survival, script, arguments):
        self.survival, self.hub, self.vault = survival, survival.hub, survival.vault
        self.script, self._arguments = script, arguments
        self._program = None                    # the new one, from USR2 on
        self._told = []                         # callables: to be told if there is no upgrade
        self._told_trouble = ""                 # why the program on disk cannot go on

    def begin(self, *told):
        """USR2: rehearse; go() follows if that went well. `told` as answer in Control.command; an
        upgrade ends this process, which needs no words."""
        self._told += told
        if not self.vault:
            self._fail(f"USR2: {why_no_vault()}, and passwords must not go to disk: no upgrade; "
                       "stop HAS and start it anew")
        elif self._program is not None:
            log.warning("USR2: an upgrade is being rehearsed already")
        else:
            try:
                self._rehearse()
            except Exception as error:          # whatever it is: everybody is still here
                self._program = None
                self._fail("USR2: the rehearsal could not be started", error)
            else:
                log.info("USR2: rehearsing the upgrade to %s", self.script)

    def _rehearse(self):
        with open(self.script, "rb") as file:
            self._program = file.read()
        Rehearsal(self.survival, self._program, self._arguments, self._on_rehearsed)

    def _on_rehearsed(self, trouble):
        if not trouble:
            self._go_soon(self.hub.now + self.ARRIVAL_SECONDS)
            return
        self._program = None
        first, *more = trouble.split("\n")
        self._fail("\n".join([f"USR2: the new {self.script} failed its rehearsal ({first}): HAS "
                              "goes on as it is", *more]))

    def _fail(self, text, error=None):
        """Say why HAS goes on as it is; an exception that no system call made is a fault."""
        fault = error if error and not isinstance(error, OSError) else None
        if error:
            text += (": a fault of HAS, which goes on as it is" if fault else
                     f": {error}; HAS goes on as it is")
        first, *more = text.split("\n")
        log.error("%s", first, exc_info=fault)
        for line in more:
            log.error("%s", line)
        told, self._told = self._told, []
        for answer in told:
            answer({"error": text, "status": 1})

    def _go_soon(self, until):
        """Clients that are no sessions yet cannot be taken along: let them arrive, but not for
        ever. Nor is it known yet what those have not got whose lines have just dropped."""
        hub = self.hub
        is_soon_better = hub.door.arrivals or not hub.places.are_settled
        if is_soon_better and hub.now < until:
            self.hub.later(self.LOOK_SECONDS, self._go_soon, until)
        else:
            self.go()

    def leave(self):
        """QUIT: end, so that systemd starts the program on disk, which goes on from its store; not
        before that can, and until then users play."""
        if self.hub.stopping:
            self._stay("")
            return
        tell_systemd("EXTEND_TIMEOUT_USEC=60000000")
        if self._program is not None:
            self.hub.later(self.AGAIN_SECONDS, self.leave)      # one is being rehearsed
            return
        try:
            with open(self.script, "rb") as file:
                self._program = file.read()
        except OSError as error:
            self._stay(str(error))
            return
        try:
            Rehearsal(self.survival, self._program, self._arguments, self._stay)
        except Exception as error:              # says nothing of the program
            log.error("QUIT: %s could not be rehearsed: %s", self.script, error)
            self._stay("")

    def _stay(self, trouble):
        """The program on disk cannot go on, or has no `trouble`: leave."""
        self._program = None
        if not trouble:
            log.info("QUIT: HAS ends, and all sessions wait in the store of systemd")
            self.go(self._leave)
            return
        self.hub.later(self.AGAIN_SECONDS, self.leave)
        if trouble != self._told_trouble:
            self._told_trouble = trouble
            self._fail(f"QUIT: {self.script} cannot go on: mend it; HAS ends then, or by --stop; "
                       f"until then users play on: {trouble}")
            tell_systemd(f"STATUS={self.script} cannot go on, so HAS stays: see its log")

    def _leave(self):
        self.vault.board[Board.FAREWELL] = Vault.LEAVE
        raise SystemExit(0)

    def go(self, do=None):
        """Replace this program now, by the new one or by itself; returns only if that failed."""
        if self.hub.stopping:                   # goodbye has been said
            self._program = None
            self._fail("HAS is being stopped, so it is not replaced any more")
            return
        heartbeat = self.hub.heartbeat
        heartbeat.mailbox.post(heartbeat.on_stop)
        heartbeat.join(1)                       # stuck in DNS: exec ends it
        parked = heartbeat.parked
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            self._execute(parked, do or self._replace)
        except Exception as error:              # whatever it is: everybody is still here
            self._fail("the new program could not be started", error)
        finally:
            self._program = None
            self._carry_on(parked)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _execute(self, parked, do):
        """Do it, with all that the new program needs in the vault."""
        state = self.survival.pack(self.vault.shelf.name, going=True)
        self.vault.store({**state, "heartbeat": self._named(parked)})
        do()

    def _replace(self):
        if self._program is not None:
            self.vault.install(self._program)
        try:
            self.vault.execute(self._arguments)
        except Exception:
            self.vault.fall_back()
            raise

    def _named(self, parked):
        """What the heartbeat has left, with a name for its socket."""
        if not parked or "connection" not in parked:
            return parked
        with socket.socket(fileno=os.dup(parked["connection"]["fd"])) as sock:
            name = self.vault.shelf.name(sock)
        return {**parked, "connection": {**parked["connection"], "fd": name}}

    def _carry_on(self, parked):
        """We are still here: make good what was stopped or parked for the new program."""
        hub = self.hub
        if hub.scribe:
            hub.scribe.rewrite()
        else:
            self.vault.clear()
        hub.heartbeat = Heartbeat(hub, hub.mailbox, hub.settings, parked)
        hub.heartbeat.start()
        self.survival.go_on(parked)

    def rescue(self):
        """An exception would end the main loop: go on with a fresh copy of the program.

        Returns if that cannot be.
        """
        survival, now = self.survival, time.time()
        survival.rescues = [at for at in survival.rescues if now - at < self.RESCUE_SECONDS] + [now]
        if not self.vault or self.hub.stopping or len(survival.rescues) > self.RESCUES:
            return
        log.error("HAS starts itself anew with every connection kept (rescue %d of %d in %d s)",
                  len(survival.rescues), self.RESCUES, self.RESCUE_SECONDS)
        self._program = None                    # one that was being rehearsed
        self.vault.fall_back()
        self.go()


class Keeper:
    """The process that outlives the worker, and starts the next one. It does nothing else: it holds
    the vault, passes signals on, and ends as the worker does.

    The worker holds one end of a pipe, whose end tells its death; the keeper one of another.
    """

    PASSED_ON = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTERM",
                                                    "SIGINT") if hasattr(signal, name)]
    SHORT_LIFE, FIRST_PAUSE, LONGEST_PAUSE, KILLED_PAUSE = 30, 0.1, 30, 1       # seconds
    LOOK_SECONDS, WEDGED_SECONDS = 5, 60
    UNKNOWN, WEDGED = 256, 257                  # no exit status is

    def __init__(self, vault, arguments, worker=0, life=-1, guard=-1):
        self._vault, self._board, self._arguments = vault, vault.board, arguments
        self._worker, self._life, self._guard = worker, life, guard
        self._since = time.monotonic()          # this worker's start
        self._quick = 0                         # deaths one after another, each soon after a start
        self._waiting, self._stops = [], False  # signals for the next worker; it is to stop
        self._is_wedged = False                 # ... and was killed for that

    def fork(self):
        """Fork a worker. There: its ends of the two pipes; here: None."""
        (life, life_end), (guard_end, guard) = os.pipe(), os.pipe()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)      # until it can take them
        pid = os.fork()
        if not pid:
            for fd in {life, guard, self._life, self._guard} - {-1}:
                os.close(fd)
            for number in self.PASSED_ON:
                signal.signal(number, signal.SIG_DFL)
            ignore_terminal()
            os.setpgid(0, 0)                    # Ctrl-C and Ctrl-Z are the keeper's
            return life_end, guard_end
        for fd in {life_end, guard_end, self._life, self._guard} - {-1}:
            os.close(fd)
        self._life, self._guard, self._worker, self._since = life, guard, pid, time.monotonic()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return None

    def run(self):
        """Keep workers alive; return the exit status of the last one."""
        self._board.put(Board.KEEPER, os.getpid())
        for number in self.PASSED_ON:
            signal.signal(number, self._pass_on)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        while True:
            self._await_death()
            status = self._reap()
            if self._board[Board.FAREWELL]:
                return self._board[Board.STATUS]
            if not self._board[Board.SERVING]:
                return status if status >= 0 else 128 - status  # it could not start
            self._note(status)
            self._start_next()

    def _pass_on(self, number, _):
        self._stops = self._stops or number in (signal.SIGTERM, signal.SIGINT)
        try:
            if not self._worker:
                raise ProcessLookupError
            os.kill(self._worker, number)
        except OSError:
            self._waiting.append(number)        # it has died: for the next one

    def _await_death(self):
        """Seconds count here while both processes could run: a suspended machine, a stopped worker
        or a stopped keeper do not look like one that turns no more."""
        beat, quiet = None, 0
        while not select.select([self._life], [], [], self.LOOK_SECONDS)[0]:
            last, beat = beat, self._board.word(Board.BEAT)
            if beat != last or not self._board[Board.SERVING] or is_stopped(self._worker):
                quiet = 0
                continue
            quiet += self.LOOK_SECONDS
            if quiet >= self.WEDGED_SECONDS:
                self._is_wedged = True
                os.kill(self._worker, signal.SIGKILL)

    def _reap(self):
        """How it ended: its exit status, minus the signal, or UNKNOWN: it was another's child."""
        worker, self._worker = self._worker, 0              # it may be another's number soon
        was_wedged, self._is_wedged = self._is_wedged, False
        try:
            _, status = os.waitpid(worker, 0)
        except ChildProcessError:
            status = None
        if was_wedged or status is None:
            return self.WEDGED if was_wedged else self.UNKNOWN
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def _note(self, status):
        board = self._board
        board.put(Board.DEATHS, board.word(Board.DEATHS) + 1)
        board.put(Board.LAST, status)
        self._vault.fall_back()
        now = time.monotonic()
        until = now + self._pause(now - self._since, status == -signal.SIGKILL)
        while time.monotonic() < until and not self._stops:
            time.sleep(0.05)

    def _pause(self, lived, was_killed):
        """Seconds until the next start: users wait, but see back_off(). A kill comes from
        outside."""
        if was_killed:
            return max(0, self.KILLED_PAUSE - lived)
        self._quick = self._quick + 1 if lived < self.SHORT_LIFE else 0
        return back_off(self._quick, self.FIRST_PAUSE, self.LONGEST_PAUSE)

    def _start_next(self):
        link = self.fork()
        if link:
            self._vault.link = link
            try:
                self._vault.execute(self._arguments)
            finally:
                os._exit(127)
        waiting, self._waiting = self._waiting, []
        if self._stops and signal.SIGTERM not in waiting:
            waiting.append(signal.SIGTERM)      # the one before died of it, or before it
        for number in waiting:
            self._pass_on(number, None)


def know_keeper(hub, vault):
    """Admins know the keeper, if there is one."""
    board = vault.board
    if vault.link:
        board.put(Board.WORKER, os.getpid())
        if not board.word(Board.KEEPER):
            board.put(Board.KEEPER, os.getppid())
        hub.control.pid = lambda: board.word(Board.KEEPER)


class Guard:
    """In the worker: replaces the keeper when that has died."""

    AGAIN_SECONDS = 2

    def __init__(self, hub, vault, arguments):
        self.owner, self.hub, self._vault, self._arguments = self, hub, vault, arguments
        self._next_at = 0.0
        if vault.link:
            hub.selector.register(vault.link[1], READ, self)
        else:                                   # an older program had none
            self._replace()

    def ready(self, events):
        """The keeper has ended."""
        with contextlib.suppress(ChildProcessError):        # it was ours, if it was not the first
            os.waitpid(self._vault.board.word(Board.KEEPER), os.WNOHANG)
        hub, vault = self.hub, self._vault
        hub.selector.unregister(vault.link[1])
        for fd in vault.link:
            os.close(fd)
        vault.link = ()
        log.warning("the keeper of HAS has died, or was killed: it is replaced")
        hub.later(max(0.0, self._next_at - hub.now), self._replace)

    def _replace(self):
        hub, vault = self.hub, self._vault
        self._next_at = hub.now + self.AGAIN_SECONDS
        (life, life_end), (guard_end, guard) = os.pipe(), os.pipe()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)      # until it can take them
        try:
            child = subprocess.Popen(
                vault.command(self._arguments) + ["--keep", f"{os.getpid()},{life},{guard}"],
                pass_fds=[*vault.fds, life, guard], stdin=subprocess.DEVNULL,
                start_new_session=True)
        except OSError as error:
            log.error("the keeper cannot be started: %s; tried again in %d s", error,
                      self.AGAIN_SECONDS)
            hub.later(self.AGAIN_SECONDS, self._replace)
            for fd in life_end, guard_end:
                os.close(fd)
        else:
            vault.board.put(Board.KEEPER, child.pid)
            vault.link = life_end, guard_end
            know_keeper(hub, vault)
            hub.selector.register(guard_end, READ, self)
            log.info("the keeper is pid %d now: send signals there", child.pid)
        for fd in life, guard:
            os.close(fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class TunnelEnd(Stream):
    """One of the two streams of a Tunnel. It holds little: what it does not take at once stays
    where it comes from."""

    HIGH, LOW = 0, 1
    __slots__ = ("unsent",)

    def __init__(self, *arguments, **more):
        self.unsent = 0            # bytes that never will be
        super().__init__(*arguments, **more)
        self.chunk = TLS_RECORD

    def _hold(self, data):
        if self._broken:
            self.unsent += len(data)
        super()._hold(data)

    def _fail(self):
        self.unsent += len(self.out)
        super()._fail()

    def left(self):
        """How many of the bytes sent here have not been acknowledged."""
        return unacknowledged(self.sock) + len(self.out) + self.unsent


class Tunnel:
    """A connection in TLS: `line` leads to the peer, `plain` to the worker."""

    port = "TLS"                                # see Lobby
    SECONDS = 10                                # for the handshake of a client
    CLOSE_SECONDS = 12                          # HAS closes within 10 s what has ended
    OFFERS = 3                                  # a worker that has died of it may not be the last
    MANY = 64                                   # records of which it is known which have arrived

    def __init__(self, front, number, context, host, is_client):
        self.front, self.number, self.host, self.is_client = front, number, host, is_client
        self._came, self._goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._came, self._goes, is_client,
                                     None if is_client else host)
        self.line = self.plain = None
        # agreed on; the peer sends no more; the worker sends no more; nor does it read
        self._is_open = self._has_ended = self._is_over = self._is_left = False
        # how often a worker may still be given it; None: one has written it down
        self._offers = self.OFFERS if is_client else None
        self._records = collections.deque()     # (bytes of the worker's, bytes in TLS)
        self._size = 0                          # in TLS, of these
        self._stuck = 0                         # bytes of the worker's that could not be encrypted

    def __str__(self):
        return f"{'client from' if self.is_client else 'link to'} {self.host} in TLS"

    def _tell(self, say, fds=(), then=None, **more):
        self.front.channel.send({"say": say, "number": self.number, **more}, fds, then)

    # ---- the handshake

    def take(self, sock):
        """A client was accepted."""
        self.line = TunnelEnd(self.front.selector, sock, self, self._from_line)

    def connect(self, target, sock):
        """Connect to there, and tell the worker of it by this socket; OSError where that fails at
        once."""
        self.plain = TunnelEnd(self.front.selector, sock, self, self._from_plain)
        self.line = TunnelEnd.connect(self.front.selector, target, self, self._from_line)

    def on_stream_open(self, line):
        """It is connected: the handshake follows."""
        self._turn()

    def _shake_hands(self):
        try:
            self._tls.do_handshake()
            self._open()
        except ssl.SSLWantReadError:
            raise
        except OSError as error:
            self._say()                         # why, to the peer
            before = "left before it was let in: " * self.is_client
            self.turn_away(f"{before}TLS handshake failed: {tls_reason(error)}")

    def _open(self):
        """Give it to the worker, which may die before it has written that down."""
        fds, host = [self.line.sock.dup().detach()], None
        if self.is_client:
            self._offers -= 1
            self.line.pause()
            ours, theirs = socket.socketpair()
            self.plain = TunnelEnd(self.front.selector, ours, self, self._from_plain)
            fds, host = [theirs.detach(), *fds], self.host
        self._is_open = True
        self.front.lobby.discard(self)
        self._tell("open", fds, host=host)

    def taken(self):
        """It has: what the client has to say is not lost with it."""
        if self._offers is not None:
            self._offers = None
            self.line.resume()
            self._turn()

    def turn_away(self, why):
        """It will not be open, and this is why."""
        self._tell("failed", host=self.host if self.is_client else None, why=why)
        self.drop()

    def overdue(self):
        """Its time is over."""
        self.turn_away(f"no TLS handshake within {self.SECONDS} s")

    # ---- to and fro

    def _from_line(self, data):
        if not self._has_ended:
            self._came.write(data)
            self._turn()

    def _turn(self):
        """What has come from the line is for OpenSSL, which may have an answer."""
        try:
            if not self._is_open:
                self._shake_hands()
            while self._is_open and self._offers is None and not self._has_ended:
                data = self._tls.read(TLS_RECORD)
                if not data:
                    raise ssl.SSLZeroReturnError
                self.plain.send(data)
                if not (self._came.pending or self._tls.pending()):
                    break                       # an exception would cost more
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:          # close_notify
            self._end("")
        except OSError as error:
            self._end(f"TLS: {tls_reason(error)}")
        self._say()

    def _say(self, count=0):
        """Send what OpenSSL has to say, in which there are `count` bytes of the worker's."""
        data = self._goes.read()
        if not data or self.line.closed:
            return
        self._records.append((count, len(data)))
        self._size += len(data)
        self.line.send(data)
        if len(self._records) > self.MANY:
            left, records = self.line.left(), self._records
            while records and self._size - records[0][1] >= left:
                self._size -= records.popleft()[1]

    def _from_plain(self, data):
        try:
            self._tls.write(data)
        except OSError as error:
            self._stuck += len(data)
            self._end(f"TLS: {tls_reason(error)}")
        self._say(len(data))

    def _unseen(self):
        """How many of the worker's bytes the peer has not acknowledged."""
        left, count = self.line.left(), self._stuck
        for size, in_tls in reversed(self._records):
            if left <= 0:
                break
            count, left = count + size, left - in_tls
        return count

    def _opposite(self, stream):
        return self.plain if stream is self.line else self.line

    def on_stream_full(self, stream):
        """It does not take more now."""
        opposite = self._opposite(stream)
        if opposite:
            opposite.pause()

    def on_stream_room(self, stream):
        """It does."""
        opposite = self._opposite(stream)
        if opposite and (opposite is self.plain or self._offers is None):
            opposite.resume()
        self._close_if_over()

    # ---- the end

    def on_stream_end(self, stream, reason):
        """One side has ended."""
        if stream is self.plain:
            self._worker_ended()
        elif self._is_open:
            self._end(reason)
        elif reason:
            self.turn_away(f"left before it was let in: {reason}" if self.is_client else reason)
        else:
            self._came.write_eof()              # OpenSSL has words for it
            self._turn()

    def _end(self, why):
        """The peer sends no more: the worker shall know that before it sees it."""
        if not self._has_ended:
            self._has_ended = True
            self._tell("ended", why=why, then=self.plain.finish)
            self._close_if_over()

    def _worker_ended(self):
        """All it has sent was read. A client that is told so sends no more; a world still answers,
        unless nobody is there to read that."""
        if not self._is_open:
            self.turn_away("nobody wants it any more")
            return
        if self._offers and not self._is_left:
            self.plain.drop()
            self._open()
            return
        self._tell("over", unseen=self._unseen())
        self._is_over = True
        if self.is_client or self._is_left:
            with contextlib.suppress(OSError):  # it reads on, too; but the farewell is written
                self._tls.unwrap()
            self._say()
        self.line.finish()
        self.front.later(self.CLOSE_SECONDS, self.drop)
        self._close_if_over()

    def leave(self):
        """Nobody is at the plain side any more: send what has come there, and close."""
        self._is_left = True
        if self._is_open:
            self.plain.resume()                 # it is not much that waits there
            self._close_if_over()
        else:
            self.turn_away("nobody wants it any more")

    def _close_if_over(self):
        if self._is_over and (self._has_ended or self._is_left) and not self.line.out:
            self.drop()

    def on_error(self):
        """A fault of HAS (it was logged)."""
        if self._is_open:
            self._tell("ended", why="a fault of HAS")
            self._tell("over", unseen=None, then=self.drop)
        else:
            self.turn_away("a fault of HAS")

    def drop(self):
        """Close both. Harmless twice."""
        self.front.lobby.discard(self)
        self.front.tunnels.pop(self.number, None)
        for stream in self.line, self.plain:
            if stream:
                stream.drop()


class TLSFront(Loop):
    """The process that speaks TLS, and nothing else: it knows no settings and has no log.

    It outlives the worker, whose end of the channel is in the vault, and ends with its last
    connection, when that is closed or it is told to.
    """

    def __init__(self, sock, clock=time.monotonic):
        super().__init__(clock)
        self.channel = Channel(self.selector, sock, self)
        self.tunnels, self.lobby = {}, Lobby(self)      # number -> Tunnel; whose hands are shaken
        self._contexts = {}                     # name -> context, or why there is none
        self._is_left = False

    @property
    def is_done(self):
        """Whether nobody needs it any more."""
        return self._is_left and not self.tunnels and not self.channel.waiting

    def run(self):
        """Turn as long as somebody does."""
        while not self.is_done:
            self.turn()

    def on_channel_end(self):
        """There is no worker, and nobody to start one."""
        self._is_left = True
        for tunnel in list(self.tunnels.values()):
            tunnel.leave()

    def on_message(self, fds, message):
        """The worker, or one before it, says something."""
        self.channel.dispatch(message.pop("do"), fds, message, "what it is asked")

    def _on_answer(self, fds):
        self.channel.send({"say": "here"})

    def _on_retire(self, fds):
        self._is_left = True

    def _on_left(self, fds, number):
        if number in self.tunnels:
            self.tunnels[number].leave()

    def _on_taken(self, fds, number):
        if number in self.tunnels:
            self.tunnels[number].taken()

    def _on_wire(self, fds, number):
        tunnel = self.tunnels.get(number)
        if tunnel and tunnel.line and not tunnel.line.closed:
            tunnel.taken()
            self.channel.send({"say": "wire", "number": number}, [tunnel.line.sock.dup().detach()])

    def _on_recipe(self, fds, name, role, values, files):
        try:
            content = {key: read_memory_file(fd) for key, fd in zip(files, fds)}
            self._contexts[name] = Recipe(role, values, content).context()
        except (ValueError, OSError) as error:
            self._contexts[name] = str(error)
        for fd in fds:
            os.close(fd)

    def _on_accept(self, fds, number, recipe, host, most, of_host):
        def begin(tunnel, sock):
            tunnel.take(sock)
            self.lobby.add(tunnel, Tunnel.SECONDS, most, of_host)
        self._begin(fds, number, recipe, host, True, begin)

    def _on_connect(self, fds, number, recipe, host, family, target):
        self._begin(fds, number, recipe, host, False, lambda tunnel, sock: tunnel.connect(
            (socket.AddressFamily(family), tuple(target)), sock))

    def _begin(self, fds, number, recipe, host, is_client, begin):
        """Make a Tunnel, and begin(it, socket); or say why not."""
        socks = [socket.socket(fileno=fd) for fd in fds]
        context, tunnel = self._contexts.get(recipe, "no recipe"), None
        try:
            if not socks:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if isinstance(context, str):
                raise ValueError(context)
            tunnel = self.tunnels[number] = Tunnel(self, number, context, host, is_client)
            begin(tunnel, socks[0])
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            self.channel.send({"say": "failed", "number": number,
                               "host": host if is_client else None, "why": why})
            if tunnel:
                tunnel.drop()
            for sock in socks:
                sock.close()


class FrontLog(logging.Handler):
    """The log of a TLSFront: the worker writes it."""

    def __init__(self, channel):
        super().__init__()
        self._channel = channel

    def emit(self, record):
        """Have the worker write this line."""
        self._channel.send({"say": "log", "level": record.levelno, "text": self.format(record)})


class Launcher:
    """Starts the program that runs once more, as the process that speaks TLS."""

    # Run by python -c: compiling leaves 30 MB of waste behind, so what runs is what was compiled.
    COMPILE = """import importlib.util, marshal, os, sys
path, name, *arguments = sys.argv[1:]
with open(path, "rb") as file:
    code = compile(file.read(), name, "exec")
fd = os.memfd_create("has")
with open(fd, "wb", closefd=False) as file:
    file.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
os.set_inheritable(fd, True)
python = os.path.realpath("/proc/self/exe")    # python3 may be another by now
os.execv(python, [python, f"/proc/self/fd/{fd}", *arguments])
"""

    def __init__(self, vault, script, arguments):
        self._vault, self._script, self._arguments = vault, script, arguments
        with open(script if vault is None else memory_path(vault.program), "rb") as file:
            self.program = binascii.crc32(file.read())

    def launch(self, fd):
        """Start it, with this descriptor; its process id. OSError."""
        fds, command = [fd], [sys.executable, self._script]
        if self._vault:
            fds.append(self._vault.program)
            command[1:] = ["-c", self.COMPILE, memory_path(fds[1]), self._script]
        return subprocess.Popen(
            [*command, *self._arguments, "--front", str(fd)], pass_fds=fds,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True).pid


# ======================================================================
# 11. Command line
#
# Arguments, the log, signals, the exit status.
# ======================================================================

class LogHandler(logging.Handler):
    """Writes the log without ever waiting: a stopped terminal (Ctrl-S, screen's copy mode), a dead
    one or a full disk stops nobody. Lines that do not fit are dropped and counted. Any thread."""

    LONGEST_WAIT_BYTES = 65536

    def __init__(self, path=""):
        super().__init__()
        self._path, self._waiting, self._dropped = path, b"", 0
        self._torn = False                      # what was written last is the beginning of a line
        self._fd = self._open()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s",
                                            "%Y-%m-%d %H:%M:%S"))

    def _open(self):
        flags = os.O_WRONLY | os.O_NONBLOCK
        if self._path:
            return os.open(self._path, flags | os.O_APPEND | os.O_CREAT, 0o640)
        try:                                    # a description of our own: its flags are ours alone
            return os.open(os.ttyname(2), flags | os.O_NOCTTY)
        except OSError:
            return 2

    def reload(self, settings):
        """Take the level and the file of these settings, opened anew (logrotate). Returns why that
        cannot be, or ""."""
        log.setLevel(settings.log_level.upper())
        path, self._path = self._path, settings.log_file
        with self.lock:
            try:
                fd = self._open()
            except OSError as error:
                trouble = (f"cannot open log_file {self._path}: {error.strerror}; the log goes on "
                           "where it was: make that file possible, then kill -HUP")
                log.error("%s", trouble)
                return trouble
            if self._path != path:
                log.info("the log goes on in %s", self._path or "standard error")
            if self._fd != 2:
                os.close(self._fd)
            self._fd = fd
        return ""

    def emit(self, record):
        """Write a line, or keep it for later, or drop it."""
        line = self.format(record).encode("utf-8", "replace") + b"\n"
        if len(self._waiting) + len(line) > self.LONGEST_WAIT_BYTES:
            self._dropped += 1
        else:
            if self._dropped and not self._waiting:
                line = b"%s(%d log lines were dropped)\n%s" % (
                    b"\n" * self._torn, self._dropped, line)
                self._dropped = 0
            self._waiting += line
        try:
            while self._waiting and self._writable():
                written = os.write(self._fd, self._waiting[:select.PIPE_BUF])
                self._torn = self._waiting[written - 1:written] != b"\n"
                self._waiting = self._waiting[written:]
        except OSError:
            told = re.findall(rb"(?m)^\((\d+) log lines were dropped\)\n", self._waiting)
            lines = self._waiting.count(b"\n") - self._waiting.startswith(b"\n") - len(told)
            self._dropped += lines + sum(map(int, told))
            self._waiting = b""

    def _writable(self):
        return bool(select.select([], [self._fd], [], 0)[1]) if self._fd < 1024 else True


def start_log(settings):
    """Begin to log as the settings say; OSError if the file cannot be opened."""
    try:
        return install_log(LogHandler(settings.log_file), settings.log_level)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"log_file = {settings.log_file}") from None


def install_log(handler, level):
    """Log by this handler alone, from this level on; return it."""
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level.upper())
    return handler


def restart_log(settings):
    """Go on with the log of another process; on standard error if its file cannot be opened."""
    try:
        return start_log(settings)
    except OSError as error:
        handler = install_log(LogHandler(), settings.log_level)
        log.error("cannot open log_file %s: %s; the log goes to standard error: make that file "
                  "possible (is its folder there?), then kill -HUP", settings.log_file,
                  error.strerror)
        return handler


def set_limits():
    """Allow as many descriptors as the system does, and no core dump: it would hold passwords.
    Returns what could not be done, in words."""
    if not resource:
        return []
    trouble, (_, hard) = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    for what, limit, words in (
            (resource.RLIMIT_NOFILE, hard, "cannot raise the limit of open files: %s"),
            (resource.RLIMIT_CORE, core_limit(),
             "cannot switch core dumps off (%s): a crash would leave passwords in one")):
        try:
            resource.setrlimit(what, (limit, limit))
        except (ValueError, OSError) as error:
            trouble.append(words % error)
    return trouble


def raise_limits(settings):
    """set_limits(), and say in the log what remains too low."""
    for remark in set_limits() + too_few_files(settings):
        log.warning("%s", remark)
    if not fcntl:
        return
    # Linux doubles the table of descriptors when it is full, and where there are threads that stops
    # all of us for 10 to 20 ms (expand_fdtable waits for RCU): once, now, for as many as may come.
    needed, allowed = files_needed(settings) or 20000, files_allowed()
    last = (min(needed, allowed) if allowed > 0 else needed) - 1
    with contextlib.suppress(OSError), open(os.devnull) as file:        # in use: an upgrade
        os.close(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, last))


def core_limit():
    """The limit that means no core dump: Linux, if it pipes them, ignores 0, obeys 1 (core(5))."""
    try:
        with open("/proc/sys/kernel/core_pattern") as file:
            return int(file.read(1) == "|")
    except OSError:
        return 0


def files_needed(settings):
    """How many descriptors max_clients takes; 0 if there is no limit."""
    each = 3 if settings.local_port_ssl else 2
    return settings.max_clients and each * settings.max_clients + 50


def too_few_files(settings):
    """A remark if the hard limit of open files cannot carry max_clients."""
    needed, hard = files_needed(settings), files_allowed(1)
    return [f"max_clients = {settings.max_clients} needs {needed} open files, the system allows "
            f"{hard}: raise the hard limit (ulimit -Hn)"] if 0 < hard < needed else []


def files_allowed(which=0):
    """How many descriptors this process may have: its soft limit (0) or its hard one (1)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[which] if resource else 1 << 30


HELP = """usage: has.py [ORDER] [OPTIONS]      without an order: run

  --check [--probe]      say what is wrong with the settings; try the world, too
orders to the HAS that runs; they wait for the outcome and print it:
  --status               how it is; --json, --prometheus: for programs
  --history [--json]     the last 50 outages, and who was not back after them
  --reload               read the settings again, as signal HUP does
  --upgrade              go on as the has.py now on disk, as USR2 does
  --stop                 say goodbye and stop, as TERM and INT do
  --notice TEXT          write TEXT to every user; --to WHO: to one character
  --maintenance TEXT     show TEXT with OFFLINE until the world is back; off: no
  --kick WHO             close a number of --status, a character, or an address;
                         --reason TEXT: and say why
  --deny ADDRESS         or network: nobody comes in; --for 30m, 1h, 2d; 0: lift
options:
  --config FILE          instead of has.conf beside has.py: one for each HAS
  --version, --help
signals: HUP, USR2, TERM, INT as above; USR1: the status to the log
exit status:
  0  done; --status: the world is up
  1  --status: it is silent or down; --probe: it lacks something; HAS could not
     start, or failed; --reload: done in part; --upgrade: HAS goes on as it is
  2  wrong settings or arguments; there is no such WHO or ADDRESS
  3  HAS is not running
"""
FLAGS = ("check", "status", "history", "reload", "upgrade", "stop")
ORDERS = {"notice": "text", "maintenance": "text", "kick": "who", "deny": "address"}
GOES_WITH = {"probe": ("check",), "json": ("status", "history"), "prometheus": ("status",),
             "to": ("notice",), "reason": ("kick",), "for": ("deny",)}


def typed_text(argument):
    """A text of the command line: UTF-8 also where the locale knows no more than ASCII."""
    return argument if argument.isprintable() else os.fsencode(argument).decode("utf-8", "replace")


def seconds_of(text):
    """The seconds of a span of time such as 90, 30m, 1h or 2d; ValueError."""
    match = re.fullmatch(r"(\d{1,7})([smhd]?)", text)
    if not match:
        raise ValueError
    return int(match.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match.group(2)]


seconds_of.__name__ = "span of time (write 30m, 1h or 2d)"     # argparse shows it in its error


def new_parser():
    """What knows all arguments; HELP explains them."""
    parser = argparse.ArgumentParser(prog="has.py", usage="has.py [ORDER] [OPTIONS], see --help")
    parser.format_help = lambda: HELP
    order = parser.add_mutually_exclusive_group()
    for name in FLAGS:
        order.add_argument("--" + name, action="store_true")
    for name in ORDERS:
        order.add_argument("--" + name)
    for name in ("config", "to", "reason"):
        parser.add_argument("--" + name)
    parser.add_argument("--for", type=seconds_of)
    for name in ("probe", "json", "prometheus"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--version", action="version", version=f"HAS {VERSION}")
    parser.add_argument("--script")             # from here on for HAS's own processes
    for name in ("vault", "link", "keep"):      # descriptors; a pid and descriptors
        parser.add_argument("--" + name, type=lambda text: [int(fd) for fd in text.split(",")])
    parser.add_argument("--front", type=int)
    parser.add_argument("--resume", type=int)   # of before the vault
    parser.add_argument("--rehearse", action="store_true")
    return parser


def is_given(options, name):
    """Whether an argument stands in the command line."""
    return getattr(options, name) not in (None, False)


def parse_arguments(arguments):
    """The command line; argparse ends the program where it is wrong."""
    parser = new_parser()
    options = parser.parse_args(arguments)
    options.goes_on = options.vault is not None or options.resume is not None
    is_ours = options.goes_on or options.front is not None
    if options.config is not None and not (is_ours or os.path.exists(options.config)):
        parser.error(f"--config {options.config}: there is no such file")
    for name, orders in GOES_WITH.items():
        if is_given(options, name) and not any(is_given(options, order) for order in orders):
            parser.error(f"--{name} goes with --{' or --'.join(orders)}")
    for name in ("notice", "maintenance", "to", "kick", "reason", "deny"):
        text = getattr(options, name)
        if text is not None and not text.strip():
            parser.error(f"--{name}: say something")
        setattr(options, name, text and typed_text(text))
    options.script = options.script or os.path.abspath(__file__)
    options.config = options.config or os.path.join(os.path.dirname(options.script), "has.conf")
    return options


TIDY_SECONDS = 86400               # between searches for garbage in everything


def tidy_by_hand(hub):
    """Have Python search for garbage among what is young only (see Hub.write_down, too): a search
    in everything stops all users, with thousands of them for a third of a second, and finds
    nothing, for sessions leave no circles (Passage.fall_apart). One a day, in case they do."""
    gc.freeze()                                 # the program itself; sessions need no search
    gc.enable()
    gc.set_threshold(10000, 1 << 30, 1 << 30)   # 700 would be a search in every turn of thousands
    hub.later(TIDY_SECONDS, tidy, hub)


def tidy(hub):
    """Search for garbage in everything."""
    gc.collect()
    hub.later(TIDY_SECONDS, tidy, hub)


def take_signals(hub, upgrade):
    """Have signals run in the main loop, between two turns' work."""
    signal.set_wakeup_fd(hub.mailbox.writer.fileno(), warn_on_full_buffer=False)
    for name, call in (("SIGHUP", hub.reload.run), ("SIGUSR1", hub.control.log_status),
                       ("SIGUSR2", upgrade.begin), ("SIGTERM", hub.stop), ("SIGINT", hub.stop),
                       ("SIGCHLD", hub.fronts.reap), ("SIGTSTP", hub.on_stop_key),
                       *[("SIGQUIT", upgrade.leave)] * Store.is_there()):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_, call=call: hub.mailbox.post(call))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, [])      # blocked over an exec: they come now


def take_from_store(options, source):
    """The vault to go on from, if systemd has started us anew, or None."""
    fds = Store.take() if Store.is_there() else None
    if not fds:
        return None
    vault = Vault(fds)
    board = vault.board
    if board[Board.FAREWELL] == Vault.END or not board[Board.SERVING]:
        vault.close()
        Store.clear()
        return None
    if board[Board.FAREWELL] == Vault.LEAVE:
        board[Board.FAREWELL] = 0
        board.put(Board.LAST, 0)
        if not vault.holds(source):
            vault.install(source)
    else:
        board.put(Board.DEATHS, board.word(Board.DEATHS) + 1)
        board.put(Board.LAST, Keeper.UNKNOWN)
        vault.fall_back()
        if not vault.holds(source):             # the one that ran, whatever stands on disk now
            vault.execute(own_arguments(options))
    return vault


def own_arguments(options):
    """What a HAS that goes on is told of where its files are."""
    return ["--script", options.script, "--config", options.config]


def main(arguments=None):
    """Run HAS; return the exit status."""
    options = parse_arguments(arguments)
    if options.front is not None:
        return run_front(options.front)
    with open(__file__, "rb") as file:
        source = file.read()                    # what runs now, whatever happens to the file

    def load():
        return load_settings(options.script, options.config)
    if options.keep:
        worker, *link = options.keep
        for fd in link:
            os.set_inheritable(fd, False)
        return Keeper(Vault(options.vault), own_arguments(options), worker, *link).run()
    orders = [name for name in (*FLAGS, *ORDERS) if is_given(options, name)]
    vault = None if options.goes_on or orders else take_from_store(options, source)
    if options.goes_on or vault:
        return resume(options, source, load, vault)
    try:
        status = carry_out(options, load, source)
        sys.stdout.flush()
        return status
    except OSError as error:
        if not isinstance(error, BrokenPipeError):          # `has.py --status | head`
            print(f"has.py: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # or the rest would be tried again
        return 1


def run_front(fd):
    """The life of the process that speaks TLS; `fd` is its end of the channel. The exit status."""
    for number in HELD_BACK - {signal.SIGCHLD}:             # they are for the worker
        signal.signal(number, signal.SIG_IGN)
    # systemd, whose unit has no KillMode=process, would wait in vain for this one, and all with it
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GOODBYE_SECONDS))
    signal.signal(signal.SIGQUIT, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    set_limits()
    front = TLSFront(socket.socket(fileno=fd))
    install_log(FrontLog(front.channel), "info")
    gc.freeze()
    try:
        front.run()
    except Exception:
        log.exception("a fault in the process that speaks TLS")
        return 1
    return 0


def carry_out(options, load, source):
    """Do what the command line asks for; return the exit status."""
    request = request_of(options)
    if request:
        return ask_running(options, control_path(options.script, options.config), request)
    try:
        settings, remarks = load()
    except SettingsError as error:
        print("\n".join(error.problems), file=sys.stderr)
        print(f"has.py: {len(error.problems)} wrong in the settings: mend it and start again",
              file=sys.stderr)
        return 2
    if options.check:
        print("\n".join([*remarks, *too_few_files(settings)]))
        trouble = start_trouble(settings, options.config)
        print("\n".join(trouble or ["has.py: the settings are right"]))
        return 2 if trouble else probe(settings) if options.probe else 0
    return keep_or_start(settings, options, source,
                         lambda vault: start_has(settings, remarks, load, options, vault))


def keep_or_start(settings, options, source, start):
    """Start HAS, in a process of its own where it can be kept; return the exit status."""
    set_limits()
    if why_no_vault():
        return start(None)
    vault = Vault.make()
    vault.install(source, trial=False)
    if Store.is_there():
        Store.put(vault)
    elif not why_no_keeper(settings):
        keeper = Keeper(vault, own_arguments(options))
        link = keeper.fork()
        if not link:
            return keeper.run()
        vault.link = link
    status = start(vault)
    vault.end(status)
    Store.clear()
    return status


def why_no_keeper(settings):
    """Why HAS does not outlive a kill; "" if it does."""
    return ("keeper = no" if settings.keeper == "no" else why_no_vault() or
            ("systemd's unit for HAS has no FileDescriptorStoreMax and FDSTORE (see README)"
             if os.environ.get("NOTIFY_SOCKET") and not Store.is_there() else ""))


def why_no_control(path):
    """Why no control socket can be made at `path`, "" if one can, or the HAS that runs has it."""
    if len(os.fsencode(path)) > LONGEST_UNIX_PATH:
        return f"a path of more than {LONGEST_UNIX_PATH} bytes: take a shorter one"
    if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
        return "there is a file that is no socket: take another path"
    if not os.access(os.path.dirname(path), os.W_OK | os.X_OK):
        return "cannot be made: make the folder, or mend its rights"
    return ""


def start_trouble(settings, conf):
    """What in this machine would keep HAS from starting, or from taking orders. (The HAS that runs
    may have its ports.)"""
    trouble, path = [], settings.log_file
    if os.path.isdir(path):
        trouble.append(f"log_file = {path}: is a folder: name a file in it")
    elif path and not os.access(path if os.path.exists(path) else os.path.dirname(path), os.W_OK):
        trouble.append(f"log_file = {path}: cannot be written: make the folder, or mend its rights")
    path = settings.control_socket or default_control_path(conf)
    if why_no_control(path):
        trouble.append(f"control_socket = {path}: {why_no_control(path)}")
    try:
        for sock in open_listeners(settings.local_address, 0):
            sock.close()
    except OSError as error:
        trouble.append(f"local_address = {settings.local_address}: {error.strerror}")
    return trouble


def probe(settings):
    """Try every address once; print what works and how to mend what does not. The exit status."""
    install_log(logging.StreamHandler(sys.stdout), "warning")   # of what the heartbeat warns
    heartbeat, good = Heartbeat(None, Mailbox(), settings), True
    for address in settings.mush_address:
        try:
            world = heartbeat.try_once(address)
        except Lost as lost:
            print(f"{address}: cannot be used: {lost}: " + (
                "somebody answers there: is that the MUSH, is mush_type right, "
                "does it take connections from here?" if lost.accepted else
                "is the MUSH up, and is mush_address right?"))
            good = False
        else:
            print(f"{address}: reachable, and it answers")
            print("\n".join(f"  {name}: {text}" for name, text in findings(world, settings)))
            good = good and not world.blind and world.rights and world.told
    return 0 if good else 1


def findings(world, settings):
    """What a confirmed world gives HAS: (what, how it is) pairs for people."""
    dialect, path = world.dialect, world.address.path
    looks = f", but it looks like a {world.looks}: set mush_type = {world.looks}"
    unknown = "not known without its login"
    return [
        ("family", dialect.name + (looks if world.looks else "") + (
            "" if dialect.logs_in else ": no logins; if it is another, set mush_type")),
        ("heartbeat login",
         "not possible with this family" if not dialect.logs_in else
         "works" if not world.blind else
         f"not taken, as said above: is {settings.hb_user} made there (README), "
         "are hb_user and hb_pass right?"),
        ("password check",
         "none in this family, and none needed" if not dialect.check_function else
         "works" if world.checks else unknown if world.blind else
         f"not allowed: set the heartbeat's {dialect.needed_flag} flag"),
        ("heartbeat's flag",
         unknown if world.blind and dialect.logs_in else
         "nothing is missing" if world.rights or dialect.check_function else
         f"lacks {dialect.needed_flag}: it is shut out while logins are disabled: set the flag"),
        ("real address",
         "off (remotehostname_cmd)" if settings.remotehostname_cmd == "none" else
         "over TCP this family cannot be told; by its unix socket it can"
         if dialect is UNIX_DIALECT and not path else
         "this family cannot be told" if not dialect.address_line("192.0.2.1", 0, "auto", path) else
         "the world is told" if world.told else
         "not understood: switch it on in the MUSH (README)")]


def owners_of(sock, path):
    """The user ids of who made the socket at `path`, and who listens where `sock` is connected."""
    owners = {os.stat(path).st_uid}
    if hasattr(socket, "SO_PEERCRED"):          # Linux; struct ucred: pid, uid, gid (unix(7))
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        owners.add(struct.unpack("3i", peer)[1])
    return owners


def believed_owners(path, options):
    """Whose control socket is HAS's: ours, root's, theirs who could change its folder or HAS."""
    owners = {0, os.geteuid()}
    for place in (os.path.dirname(path), options.script, options.config):
        if os.path.exists(place):
            owners.add(os.stat(place).st_uid)
    return owners


def user_name(number):
    """A user of this machine for people."""
    try:
        import pwd                              # not on every platform
        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"user {number}"


def request_of(options):
    """What the command line asks of the running HAS (Control.command), or None."""
    for name in FLAGS[1:]:                      # --check asks nobody
        if is_given(options, name):
            return {"do": name}
    more = {"to": options.to, "reason": options.reason, "seconds": getattr(options, "for")}
    for name, what in ORDERS.items():
        if is_given(options, name):
            return {"do": name, what: getattr(options, name), **more}
    return None


class NotRunning(Exception):
    """No HAS answers, or none that can be believed."""


def answers_of(options, path, request):
    """Yields the answers of the HAS that runs, dictionaries, until it hangs up. NotRunning."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect(path)
            strangers = owners_of(sock, path) - believed_owners(path, options)
            if strangers:
                raise NotRunning(
                    f"{path} belongs to {user_name(min(strangers))}, who may be anybody: not "
                    "believed; ask as the user who runs HAS, or remove it")
            sock.sendall(json.dumps(request).encode() + b"\n")
            sock.settimeout(OUTCOME_SECONDS if request["do"] in ("upgrade", "stop") else 10)
            with sock.makefile("rb") as answers:
                yield from map(json.loads, answers)
    except ConnectionResetError:
        pass                                    # it has ended with us waiting
    except (FileNotFoundError, ConnectionRefusedError):
        hint = "" if path == default_control_path(options.config) else (
            "; one that was started before control_socket was changed: by its PID only")
        raise NotRunning(f"no HAS runs with {options.config}: nobody listens at {path}{hint}"
                         ) from None
    except PermissionError:
        raise NotRunning(f"{path} is only for the user who runs HAS, and for root") from None
    except (OSError, ValueError) as error:
        raise NotRunning(f"no HAS answers at {path}: {error}") from None


OUTCOME_SECONDS = 60               # for the rehearsal of an upgrade, or the goodbyes, and a reserve


def ask_running(options, path, request):
    """Put a request to the running HAS and print what came of it; return the exit status."""
    try:
        if request["do"] == "upgrade":
            return ask_for_upgrade(options, path)
        answer = None
        for answer in answers_of(options, path, request):
            print_answer(answer, request, options)
        if answer is None:
            answer = {"error": "HAS has died, or was stopped, before it answered: see --status, "
                               "its log, and whether that was done", "status": 1}
            print_answer(answer, request, options)
    except NotRunning as error:
        print(f"has.py: {error}", file=sys.stderr)
        return 3
    if request["do"] == "stop" and "done" in answer:
        print("stopped")
    if request["do"] == "status" and "world" in answer:
        return 0 if answer["world"]["health"] in ("up", "blind") else 1
    return answer.get("status", 2) if "error" in answer else 0


def history_lines(history):
    """The history (History.told) as lines of text for people."""
    columns = "{:<19}  {:<9} {:>5} {:>5}  {:<7} {}"
    lines = [columns.format("when", "lasted", "users", "back", "within", "why")]
    for outage in history["outages"]:
        lasted = "until now" if outage["seconds"] is None else ago(outage["seconds"])
        lines.append(columns.format(
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(outage["at"])), lasted,
            outage["users"], outage["back"], ago(outage["back_after"]) if outage["back"] else "-",
            outage["why"]))
        absent = [f"{name} ({why})" for name, why in outage["absent"]]
        if absent:
            lines.append(f"    not back: {', '.join(absent)}")
    if history["waiting"]:
        lines.append(f"    still waiting: {', '.join(history['waiting'])}")
    return lines if history["outages"] else ["no outage since HAS was started"]


def prometheus_lines(status):
    """The status (Control.status) in the text format of Prometheus, version 0.0.4."""
    states, world = [state.name for state in State] + ["AWAY"], status["world"]
    by_state = collections.Counter(session["state"] for session in status["sessions"])
    label = re.sub(r"[\\\"]", lambda it: "\\" + it.group(), world["addresses"][0])
    lines = []
    for name, kind, meaning, values in (
            ("world_up", "gauge", "1: users can play", {"": world["health"] in ("up", "blind")}),
            ("users", "gauge", "users by state of their session",
             {f',state="{state}"': by_state[state] for state in states}),
            ("outages_total", "counter", "outages of the world", {"": status["outages"]["count"]}),
            ("down_seconds_total", "counter", "seconds of all outages",
             {"": status["outages"]["seconds"]}),
            ("returns_total", "counter", "users logged in again by HAS",
             {"": status["returns"]["done"]}),
            ("return_failures_total", "counter", "... whose login was refused then",
             {"": status["returns"]["failed"]}),
            ("round_trip_seconds", "gauge", "time in which the world answered last",
             {"": status["round_trip"]}),
            ("bytes_total", "counter", "bytes from users (in) and to them (out)",
             {f',direction="{way}"': status["bytes"][way] for way in ("in", "out")}),
            ("start_time_seconds", "gauge", "when HAS was started", {"": status["started"]})):
        lines += [f"# HELP has_{name} {meaning}", f"# TYPE has_{name} {kind}"]
        lines += [f'has_{name}{{world="{label}"{more}}} {float(value):.15g}'
                  for more, value in values.items() if value is not None]
    return lines


def print_answer(answer, request, options):
    """What came of a request, or of a part of it, for people; or as JSON."""
    if "error" in answer:
        print(f"has.py: {answer['error']}", file=sys.stderr)
    elif "done" in answer:
        print(answer["done"])
    elif options.json:
        print(json.dumps(answer, indent=1))
    else:
        lines = (history_lines if request["do"] == "history" else
                 prometheus_lines if options.prometheus else status_lines)
        print("\n".join(lines(answer)))


def ask_for_upgrade(options, path):
    """Have the running HAS upgrade itself and wait until it has; return the exit status."""
    def status():
        answer, = answers_of(options, path, {"do": "status"})
        return answer
    before, request = status(), {"do": "upgrade"}
    for answer in answers_of(options, path, request):  # of one that was upgraded there is none
        print_answer(answer, request, options)
        return answer.get("status", 2)
    until = time.monotonic() + OUTCOME_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(NotRunning, ValueError):       # or it has ended in our face
            after = status()
            if after.get("takeovers") != before.get("takeovers"):
                break
        time.sleep(0.1)
    else:
        raise NotRunning(f"no HAS answers at {path} since the upgrade: see its log")
    if after.get("worker") != before.get("worker", after.get("worker")):
        print(f"has.py: HAS has died in the upgrade (see the log), and goes on as HAS "
              f"{after['version']}", file=sys.stderr)
        return 1
    print(f"pid {after['pid']}: HAS {before['version']} became {after['version']}, "
          f"{len(after['sessions'])} of {len(before['sessions'])} sessions go on")
    if after.get("fell_back"):
        print("has.py: the new program could not take over (see the log): the old one goes on",
              file=sys.stderr)
        return 1
    return 0


def start_has(settings, remarks, load, options, vault):
    """Listen and serve; return the exit status."""
    hub = None
    ignore_terminal()
    try:
        handler = start_log(settings)
        raise_limits(settings)
        hub = Hub(settings, load)
        survival = Survival(hub, vault)
        if vault:
            know_keeper(hub, vault)
        log.info("HAS %s, pid %d, Python %s, world %s", VERSION, hub.control.pid(),
                 sys.version.split()[0], ", ".join(map(str, settings.mush_address)))
        hub.heartbeat = Heartbeat(hub, hub.mailbox, settings)
        hub.control.open(settings.control_socket or default_control_path(options.config))
        hub.door.listen()
    except OSError as error:
        if hub:
            hub.control.close()
        where = f"{error.filename}: " if error.filename else ""
        trouble = f"cannot start: {where}{error.strerror or error}"
        if log.handlers:
            log.error("%s", trouble)
        if settings.log_file:                   # nobody looks there now; it may be another HAS's
            print(f"has.py: {trouble}", file=sys.stderr)
        return 1
    log_remarks(remarks)
    if why_no_keeper(settings):
        log.info("a kill -9 of HAS would end every session: %s", why_no_keeper(settings))
    return serve(survival, handler, options)


class Handed:
    """What a program of before the vault has left: values in a memory file, and descriptors by
    number. To be used as a Vault."""

    def __init__(self, file):
        self._file, self._fds = file, []
        self._state = json.loads(read_memory_file(file).decode())

    def load(self):
        """What Survival.pack() gave there."""
        return self._state

    def take(self, fd):
        """The socket with that number."""
        self._fds.append(fd)
        return socket.socket(fileno=fd)

    def go_back(self, _):
        """The new program has failed: execute the one before it, kept in one more memory file;
        returns if no other could do better."""
        kept = self._state.get("kept")          # none to rehearse
        if self.is_last:
            return
        log.exception("the new program could not take over: the old one goes on")
        os.execv(sys.executable, [sys.executable, memory_path(kept), *sys.argv[1:]])

    @property
    def is_last(self):
        """Whether no other program could do better."""
        kept = self._state.get("kept")
        return kept is not None and own_memory_file() == kept

    fell_back = is_last                         # it executes none again but for that

    def keep(self, source):
        """Nothing can fail any more: the Vault to go on with, with our own program in it."""
        own = own_memory_file()
        for fd in self._fds + [own] * (own is not None):
            with contextlib.suppress(OSError):  # closed with its session
                os.set_inheritable(fd, False)
        for fd in {self._file, self._state["kept"], self._state.get("program")} - {own, None}:
            os.close(fd)
        vault = Vault.make()
        vault.install(source, trial=False)
        return vault


def resume(options, source, load, vault=None):
    """Go on where another process has left off (Upgrade), with what it has left in this vault, or
    in that of the command line; return the exit status."""
    set_limits()                                # before: a socket in flight needs a descriptor
    gc.disable()                                # all that is made here stays: see tidy_by_hand
    was_started = vault is not None             # by systemd: what stands on disk counts
    vault = vault or (Handed(options.resume) if options.vault is None else
                      Vault(options.vault, options.link or ()))
    state, last = vault.load(), vault.is_last
    try:
        conf = state.get("conf", options.config if read_conf(options.config)[0] else "")
        settings = settings_of(state["settings"], unpack(state.get("files")), conf)
        handler = restart_log(settings)
        hub = Hub(settings, load)
        survival = Survival(hub)
        if isinstance(vault, Vault):
            survival.take_up_now = vault.take_up
        survival.unpack(state, vault.take, whole=options.rehearse or not last)
        failed = vault.fell_back and not hub.record.fell_back
        hub.record.taken_over(vault.fell_back)
        if options.rehearse:
            os.write(1, proof_of_rehearsal(state.get("nonce"), len(hub.sessions)))
            os._exit(0)                         # no goodbye: the connections are another process's
        parked, ours = take_parked(state["heartbeat"], vault.take)
        hub.heartbeat = Heartbeat(hub, hub.mailbox, settings, parked)
    except Exception:
        if not options.rehearse:
            vault.go_back(own_arguments(options))
        raise
    survival.vault = vault = vault.keep(source)
    know_keeper(hub, vault)

    def go_on():
        raise_limits(settings)
        log.info("HAS %s goes on where %s left off, pid %d: %d sessions", VERSION,
                 state["version"], hub.control.pid(), len(hub.sessions))
        tell_death(vault.board)
        if failed:
            log.error("the new has.py (HAS %s) did not last a minute: the old one (HAS %s) runs "
                      "again. If the new one was killed by hand, --upgrade again; if not, mend it "
                      "first", state["version"], VERSION)
        if was_started:
            hub.later(0, hub.reload.run)
        else:
            warn_of_differences(settings, load)
        survival.go_on(parked)
    status = serve(survival, handler, options, go_on, ours)
    vault.end(status)
    Store.clear()
    return status


def take_parked(parked, take):
    """What the heartbeat has left, for its successor, and once more with a socket for others."""
    if not parked or "connection" not in parked:
        return parked, parked
    connection = parked["connection"]
    sock = take_or_ended(take, connection["fd"])
    return ({**parked, "connection": {**connection, "fd": os.dup(sock.fileno())}},
            {**parked, "connection": {**connection, "fd": sock}})


def tell_death(board):
    """Say in the log how the process before this one has died, if it did."""
    deaths, status = board.word(Board.DEATHS), board.word(Board.LAST)
    if deaths and status:
        how = (f"was killed by {signal.Signals(-status).name}" if status < 0 else
               "has died" if status == Keeper.UNKNOWN else
               f"did not turn for {Keeper.WEDGED_SECONDS} s (a bug: report it) and was killed"
               if status == Keeper.WEDGED else f"ended with status {status}")
        why = ": by hand, or the system had no memory left" if status == -signal.SIGKILL else ""
        log.error("HAS %s%s; its users were kept (death %d since its start)", how, why, deaths)
        board.put(Board.LAST, 0)


def own_memory_file():
    """The descriptor of the memory file this program runs from, or None: a file on disk. It stays
    open: a traceback reads its lines there, and must find no other file under that number."""
    folder, _, name = __file__.rpartition("/")
    return int(name) if folder == memory_path("").rstrip("/") else None


def warn_of_differences(settings, load):
    """After an upgrade the settings in force go on; a new has.py has brought its own constants."""
    try:
        on_disk, _ = load()
    except Exception as error:                  # whatever it is: they are not needed now
        log.warning("the settings on disk cannot be used; those in force go on, with their "
                    "certificate: mend this before the next HUP or start: %s",
                    str(error).partition("\n")[0])
        return
    differ = [key for key in SETTINGS if on_disk.texts[key] != settings.texts[key]]
    if differ:
        log.warning("the settings on disk are not those in force: %s; they count from the next HUP "
                    "or start: if the new has.py brought them, put yours back now, best into "
                    "has.conf", ", ".join(differ))


def serve(survival, handler, options, go_on=None, parked=None):
    """Start the heartbeat, go_on() where a process left off, turn until the end. The status."""
    hub, upgrade = survival.hub, Upgrade(survival, options.script, own_arguments(options))
    hub.reload.log, hub.control.upgrade = handler.reload, upgrade.begin
    launcher = Launcher(survival.vault, options.script, own_arguments(options))
    hub.fronts.launch, hub.fronts.program = launcher.launch, launcher.program
    hub.fronts.look()
    watch_over(survival, own_arguments(options), parked)
    hub.door.most_files = files_allowed()
    hub.heartbeat.start()
    hub.places.look()
    take_signals(hub, upgrade)
    tidy_by_hand(hub)
    tell_systemd("READY=1")
    try:
        if go_on:
            go_on()
        hub.run()
    except Exception:
        log.exception("a fault in the main loop of HAS")
        upgrade.rescue()
        if hub.scribe and not hub.stopping:
            log.error("HAS ends by the fault above (report it), and its keeper starts it anew")
            raise SystemExit(1) from None
        log.error("HAS stops: see the fault above, and report it")
        hub.control.close()
        return 1
    hub.heartbeat.join(1)
    log.info("stopped")
    return 0


def watch_over(survival, arguments, parked):
    """From now on all is written down for the next process, where one will be started."""
    hub, vault = survival.hub, survival.vault
    if not vault:
        return
    hub.later(Upgrade.TRIAL_SECONDS, vault.prove)
    if vault.link or Store.is_there() or not why_no_keeper(hub.settings):
        hub.scribe = Scribe(survival)
        hub.scribe.begin(parked)
    else:
        vault.clear()
    if hub.scribe and not Store.is_there():
        survival.guard = Guard(hub, vault, arguments)


def prepare_output():
    """What the shell may have left out: descriptors 0 to 2 (`>&-`), or a client would be given the
    number of the log; and a character set (LC_ALL=C), or a name could not be printed."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)    # the lowest that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    prepare_output()
    sys.exit(main())
