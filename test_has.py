#!/usr/bin/env python3
"""Tests of HAS: `python3 test_has.py` runs them all, `python3 test_has.py NAME ...` some of them
(classes, or CLASS.TEST). Which class tests which part of has.py, in the order of this file:

    1. Settings       TestSettings
    2. Telnet         TestScanner, TestScannerAtLength, TestReplay, TestSpelling
    3. Dialects       TestLogin, TestHostileLines, TestChecks, TestChanges, TestNoise, TypedBytes
    4. Logins         TestChange, TestProof
    5. Wire           TestMailbox, TestStream, TestProxyHeader, TestChannel
    6. Session        StateTable, then a RigCase for each rule: Serials ... Limits
    7. Heartbeat      TestTalk ... TestHeartbeatByHand without its thread, TestHeartbeat with it
    8. Health         EveryOrder, TestHealth, TestLoss, TestSuspects, HeartbeatAlone, ManyEnd
    9. Hub            Pace, Lobby, Listeners, Turns, LoginBrake, TestLoginBrake, Limits
    10. Survival      TestRecords, TestShelf, TestVault, Died, TakenOver...,
                      TestUpgrade..., TestKeeper, TestSystemd; InTLS, HandshakesOfTLS, FrontsOfTLS,
                      PlaceInTLS
    11. Command line  TestPartsOfTheProgram, TestProgram, TestTLS
    the files         TestFiles: what README, has.conf and the shape of has.py promise

What is pure comes first, then what runs in this process with a clock of our own (Rig), the
heartbeat alone, HAS as a program in front of scripted worlds (TestTeeny ... TestRhost: the main job
in each family; TestWorldHealth, TestCrashes, TestTelnet..., TestStreams, TestRelay, TestAddress),
the program, and HAS in front of a real TinyMUX where one is installed. Clients, worlds, --bench,
--demo and --soak stand under the last banner, Tools.

Nothing sleeps to wait for something: it waits for the thing, with a deadline.
"""
import argparse
import ast
import atexit
import base64
import collections
import contextlib
import errno
import fcntl
import faulthandler
import functools
import gc
import heapq
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import platform
import pty
import py_compile
import random
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import unittest
import unittest.mock
from unittest import mock
import has
from has import CHARSET, DIALECTS, DO, DONT, ECHO, GMCP, NAWS, SB, SE, TTYPE, WILL, WONT, command


HAS = os.path.abspath(has.__file__)
HERE = os.path.dirname(HAS)


# ======================================================================
# What several layers use
#
# Telnet bytes and text.
# ======================================================================

IAC, AYT, LINEMODE, MSSP = 255, 246, 34, 70
VERBS = {DONT: "DONT", DO: "DO", WONT: "WONT", WILL: "WILL"}


BINARY, SGA, EOR = 0, 3, 25


def offer(*pairs):
    """Telnet bytes for (verb, option), (verb, option) ..."""
    return b"".join(bytes((IAC, verb, option)) for verb, option in pairs)


def sub(option, body):
    return bytes((IAC, SB, option)) + body + bytes((IAC, SE))


def naws(width, height):
    return sub(NAWS, struct.pack(">HH", width, height).replace(b"\xff", b"\xff\xff"))


SEND_TTYPE = sub(TTYPE, b"\x01")
TTYPES = [b"TINTIN++", b"XTERM-256COLOR", b"MTTS 269"]
CORE_HELLO, CORE_SUPPORTS = sub(GMCP, b'Core.Hello {"client":"t"}'), sub(
    GMCP, b'Core.Supports.Set ["Char 1"]')
TOKEN = re.compile(
    rb"\xff\xfa(?:[^\xff]|\xff[^\xf0])*\xff\xf0|\xff[\xfb-\xfe].|"
    rb"\xff[^\xfa-\xff]|\xff\xff|[^\xff]+", re.S)


def tokens(data):
    """Whole telnet commands and runs of text; and what is left, an unfinished command."""
    found, at = [], 0
    match = TOKEN.match(data)
    while match:
        found.append(match.group())
        at = match.end()
        match = TOKEN.match(data, at)
    return found, data[at:]


def is_command(token):
    return token[:1] == b"\xff" and token != b"\xff\xff"


def new_folder(case, **how):
    """A folder that goes when the test ends."""
    folder = tempfile.mkdtemp(**how)
    case.addCleanup(shutil.rmtree, folder, ignore_errors=True)
    return folder


def closed_after(case, thing):
    """`thing`, which is closed when the test ends."""
    case.addCleanup(thing.close)
    return thing


def patched(case, patch):
    """Start a patch that ends with the test."""
    case.addCleanup(patch.stop)
    return patch.start()


def write_text(path, text):
    with open(path, "w") as file:
        file.write(text)


def read_text(path):
    with open(path) as file:
        return file.read()


def secrets_seed():
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"fresh seed {seed}", file=sys.stderr)
    return seed


PARTS = [b"\xff\xff", b"\xff\xf1", b"\xff\xf9", naws(255, 10), SEND_TTYPE,
         CORE_HELLO, sub(CHARSET, b"\x02UTF-8"), b"\xff\xfb\x56",
         b"\xff\xfd\x1f", b"\xff\xfe\x01", b"caf\xc3\xa9", b"\x1b[31mred\x1b[0m",
         b"hello there", b"\xff", b"\xff\xfa", b"\xff\xf0", b"\0"]


def wild(rng):
    """A random or mutated piece of a telnet stream, without line ends (those would be commands to
    the game)."""
    if rng.random() < 0.2:
        return bytes(rng.choice(b"\xff\xff\xfa\xf0\xfb\xfd\x1f\x18UVWab\0\x80")
                     for _ in range(rng.randrange(12)))
    data = bytearray(b"".join(rng.choices(PARTS, k=rng.randrange(1, 5))).replace(b"\n", b"\x0b"))
    if data and rng.random() < 0.4:
        data[rng.randrange(len(data))] = rng.choice(b"\xff\xfa\xf0\xfdUq\x01")
    return bytes(data)


def chop(rng, stream):
    while stream:
        size = rng.choice((1, 2, 3, 7, 40, 400))
        yield stream[:size]
        stream = stream[size:]


# ======================================================================
# Parts 1 to 5: what is pure
#
# Tables of bytes in and events out.
# ======================================================================

FAMILIES = ("teenymush", "pennmush", "tinymush", "tinymux", "rhostmush")


def splits(data):
    """`data` whole, byte by byte, and in every two-way split."""
    yield [data]
    yield [data[n:n + 1] for n in range(len(data))]
    for n in range(1, len(data)):
        yield [data[:n], data[n:]]


# ---- 1. Settings

# Today's words: what users read only now and then, and tests look for.
RARE_NOTICES = {
    "guest_notice": "# NOTICE # This world is ONLINE again. Guests have to log in again.",
    "login_kept_notice": "# NOTICE # You will be logged in when the world returns.",
    "unsent_more_notice": "(and {lines} lines more)",
    "still_offline_notice": "# NOTICE # This world has been OFFLINE for {time}. Still waiting.",
    "maintenance_notice": "# NOTICE # {text}",
    "hold_over_notice": "# NOTICE # The world is still offline. Please come back later.",
    "login_brake_notice": "# NOTICE # Too many logins were tried from your address: yours goes on "
                          "in {seconds} s.",
    "too_long_notice": "# NOTICE # That line is too long.",
    "unreadable_notice": "# NOTICE # This world cannot read that line.",
    "reattach_from_notice": "# NOTICE # Your line was lost at {old}; you are back from {new}.",
    "reattach_doubtful_notice": "# NOTICE # Perhaps you saw these:",
    "reattach_missed_notice": "# NOTICE # You missed {lines} line(s):",
    "reattach_lost_notice": "# NOTICE # Of what you missed the first {lines} line(s) are lost.",
    "reattach_end_notice": "# NOTICE # That is all. You are back.",
    "reattach_elsewhere_notice": "# NOTICE # Your session goes on at {address}.",
    "full_notice": "# NOTICE # Too many users are connected now. Please try again later.",
    "full_host_notice": "# NOTICE # Too many connections from your address.",
    "kicked_notice": "# NOTICE # You were disconnected by an administrator.",
    "kick_reason_notice": "# NOTICE # Reason: {reason}",
    "denied_notice": "# NOTICE # This world takes no connections from your address.",
    "goodbye_notice": "# NOTICE # The front end of this world is going down. Goodbye.",
    "output_lost_notice": "<output lost: {lines} lines>",
    "are_you_there_notice": "[Yes]",
    "list_heading_notice": "id name address state age idle in out tls size"}


def told_of(cut, spelling=has.PLAIN_SPELLING):
    """What a client reads in place of `cut`."""
    return spelling.lost(cut, RARE_NOTICES["output_lost_notice"])


SCRIPT_VALUES = {
    "mush_address": "mush.example:4096", "local_port": 4201, "hb_pass": "s3cr3t",
    "beat": 10, "local_address": "",
    "offline_notice": "# off"}


class SettingsCase(unittest.TestCase):
    """A has.py and a has.conf in a directory of their own."""

    def setUp(self):
        folder = new_folder(self)
        self.script, self.conf = (os.path.join(folder, name) for name in ("has.py", "has.conf"))
        with open(os.path.join(HERE, "has.py"), encoding="utf-8") as file:
            shipped, self.problems = has.read_constants(file.name)
        self.values = {key: text for key, (text, _) in shipped.items()}
        self.values.update(SCRIPT_VALUES)

    def load(self, conf=None, extra="", encoding="utf-8", **changed):
        """Load constants (changed; None: left out) with `conf` over them; `extra` goes into the
        block."""
        values = {**self.values, **changed}
        lines = [f"{key.upper()} = {value!r}" for key, value in values.items() if value is not None]
        block = "\n".join(["import os", has.BEGIN_MARK + " ----", *lines,
                           extra, has.END_MARK + " ----", "1 / 0", ""])
        with open(self.script, "w", encoding=encoding) as file:
            file.write(block)
        if conf is not None:
            with open(self.conf, "w", encoding=encoding) as file:
                file.write(conf)
        return has.load_settings(self.script, self.conf)

    def wrong(self, conf=None, **more):
        """The problems of a load, with S and C for the names of the two files."""
        with self.assertRaises(has.SettingsError) as caught:
            self.load(conf, **more)
        return [line.replace(self.script, "S").replace(self.conf, "C")
                for line in caught.exception.problems]


class TestSettings(SettingsCase):
    def test_every_key_has_a_constant_and_the_other_way_round(self):
        self.assertEqual(self.problems, [])
        self.assertEqual(set(has.read_constants(os.path.join(HERE, "has.py"))[0]),
                         set(has.SETTINGS))

    def test_hosts_that_no_resolver_could_take_are_refused(self):
        for host in ("mush..example.org", ".example.org", "a" * 64 + ".org", "a" * 64,
                     ".".join(["a" * 60] * 5), "..", ".", "300.1.1.1", "1.2.3", "1.2.3.4.5",
                     "[1.2.3.4]", "[::zz]", "[:::1]", "[::1.2.3.4.5]"):
            with self.subTest(host):
                problem, = self.wrong(f"mush_address = {host}:4096")
                self.assertRegex(problem, "is no host name|is no IPv[46] address|is not host:port")
        for host in ("mush.example.org", "mush.example.org.", "a" * 63,
                     "my_mush", "4mush", "[::1]", "[::ffff:1.2.3.4]"):
            self.load(f"mush_address = {host}:4096")

    def test_settings_that_an_older_program_took(self):
        constants, _ = has.read_constants(has.__file__)
        texts = {key: text for key, (text, _) in constants.items()}
        for address, left in (("mush..example:1, mush.example:2", ["mush.example:2"]),
                              ("300.1.1.1:5", [texts["mush_address"]])):
            settings = has.settings_of({**texts, "mush_address": address}, {}, "")
            self.assertEqual([str(it) for it in settings.mush_address], left)
        heartbeat = has.Heartbeat(None, None, settings_of(()))
        heartbeat._unpark({"current": "a..b:1", "wanted": "", "login_after": 0.0,
                           "down_since": None,
                           "known": [["a..b:1", "tinymux"], ["mush.example:2", "tinymux"]]})
        self.assertEqual((heartbeat._course.current,
                          [str(it) for it in heartbeat._entrance._known]),
                         (None, ["mush.example:2"]))

    def test_a_comment_behind_a_value_is_warned_of(self):
        for key, value in (("log_file", "has.log # logs"), ("admins", "Alice # me"),
                           ("hb_user", "beat ; the bot"),
                           ("mush_ssl_ca", "/dev/null # none")):
            if key == "mush_ssl_ca":
                self.assertIn("a comment needs a line of its own",
                              self.wrong(f"{key} = {value}")[0])
                continue
            _, remarks = self.load(f"{key} = {value}\n")
            self.assertIn(f"WARNING: {self.conf}:1: {value[value.index(' ') + 1:]!r} counts as a "
                          f"part of {key}: a comment "
                          "needs a line of its own", remarks)
        for conf in ("offline_notice = # NOTICE # down # really", "log_file = has#1.log",
                     "# beat = 1 # x"):
            self.assertFalse([remark for remark in self.load(conf)[1]
                              if "counts as a part" in remark])
        self.assertEqual(self.wrong("beat = 10 # seconds"), [
            "C:1: beat = 10 # seconds: is not a number; a comment needs a line of its own"])

    def test_a_file_that_is_not_utf_8_is_named_with_line_and_column(self):
        conf = "# caf\n\noffline_notice = \u00e4 caf\u00e9\n"
        self.assertEqual(self.wrong(conf, encoding="latin-1")[-1],
                         "C:3: column 18: the byte 0xe4 is not UTF-8: save it as UTF-8")

    def test_who_else_may_write_is_warned_of(self):
        def warned(path):
            return [remark for remark in self.load("beat = 1")[1] if "others may write"
                    in remark and path in remark]
        self.load("beat = 1")
        folder = os.path.dirname(self.script)
        for path, mode, kept in ((self.script, 0o664, 0o644), (self.conf, 0o646, 0o600),
                                 (folder, 0o777, 0o700)):
            with self.subTest(path):
                self.assertEqual(warned(path), [])
                os.chmod(path, mode)
                self.assertTrue(warned(path))
                os.chmod(path, kept)
        os.chmod(folder, 0o1777)                # sticky, as /tmp: others cannot replace our files
        self.assertEqual(warned(folder), [])
        os.mkdir(folder + "/log", 0o700)
        os.chmod(folder + "/log", 0o777)
        self.assertRegex("".join(self.load("log_file = log/x.log")[1]),
                         f"others may write in {folder}/log, and put another x.log there")
        os.chmod(folder, 0o755)                 # who owns the folder can do the same
        owner = me = os.geteuid()
        if not me:
            owner = 12345
            os.chown(folder, owner, -1)
        with mock.patch.object(os, "geteuid", return_value=me + bool(me)):
            self.assertIn(f"{folder} belongs to another user (number {owner}), who may put another "
                          "has.py there: chown it", "".join(self.load("beat = 1")[1]))

    def test_a_front_that_is_everybody_is_warned_of(self):
        for listed, warned in (("127.0.0.1", 0), ("10.0.0.0/8, ::/0", 1), ("0.0.0.0/0", 1)):
            _, remarks = self.load(f"proxy_from = {listed}")
            self.assertEqual(sum("proxy_from lists everybody" in it for it in remarks), warned)

    def test_bad_lines_of_has_conf_have_exact_messages(self):
        number = "is not a number"
        bad_address = "is not host:port, [v6]:port or unix:/path with a port from 1 to 65535"
        for line, message in (
                ("beat = ten", "C:1: beat = ten: " + number),
                ("beat = nan", "C:1: beat = nan: is not between 0.05 and 1000000"),
                ("beat = 0", "C:1: beat = 0: is not between 0.05 and 1000000"),
                ("local_port = 65536", "C:1: local_port = 65536: is not between 0 and 65535"),
                ("local_port = 1.5", "C:1: local_port = 1.5: " + number),
                ("local_prot = 1", "C:1: local_prot: no such setting; did you mean local_port?"),
                ("LOCAL_PORT = 1", "C:1: LOCAL_PORT: no such setting; did you mean local_port?"),
                ("zzz = 1", "C:1: zzz: no such setting"),
                ("= 1", "C:1: : no such setting"),
                ("hb_pass Secret", "C:1: this line is not `key = value`"),
                ("hb_pass = a\n b", "C:1: hb_pass = (hidden) (goes on, indented) (hidden): "
                                    "must be one word without blanks"),
                ("b\x1b[31mt = 1", "C:1: b?[31mt: no such setting"),
                (" beat = 1", "C:1: this indented line continues nothing: start keys in column 1"),
                ("beat = 1\n\n# x\nbeat = 2",
                 "C:4: beat is set a second time (first at C:1): delete one"),
                ("mush_type = mud", "C:1: mush_type = mud: is not one of auto, "
                 + ", ".join(has.FAMILIES)),
                ("log_level = loud", "C:1: log_level = loud: is not one of debug, info, warning, "
                                     "error"),
                ("mush_address =", "C:1: mush_address = : names no address: write host:port"),
                ("mush_address = a:1, a:1", "C:1: mush_address = a:1, a:1: names the same address "
                                            "twice"),
                ("mush_address = a", "C:1: mush_address = a: 'a' " + bad_address),
                ("mush_address = a:0", "C:1: mush_address = a:0: 'a:0' " + bad_address),
                ("mush_address = a:70000", "C:1: mush_address = a:70000: 'a:70000' " + bad_address),
                ("mush_address = ::1:4096", "C:1: mush_address = ::1:4096: '::1:4096' "
                 + bad_address),
                ("mush_address = unix:x", "C:1: mush_address = unix:x: a unix socket needs a full "
                                          "path: "
                                          "unix:/path/to/netmush.sock"),
                (f"mush_address = unix:/{'x' * 200}",
                 f"C:1: mush_address = unix:/{'x' * 200}: the path of a unix socket may "
                 f"have {has.LONGEST_UNIX_PATH} bytes, and no NUL"),
                ("add_epoch_time = maybe", "C:1: add_epoch_time = maybe: is neither yes nor no"),
                ("remotehostname_cmd = a b", "C:1: remotehostname_cmd = a b: must be one word "
                                             "without blanks"),
                ("hb_user = a\"b", "C:1: hb_user = a\"b: must be a character's name"),
                ("hb_pass = two words", "C:1: hb_pass = (hidden): must be one word without blanks"),
                ("offline_notice = a\tb", "C:1: offline_notice = a\tb: holds control characters"),
                ("local_address = here", "C:1: local_address = here: 'here' does not appear to be "
                                         "an IPv4 or IPv6 address"),
                ("proxy_from = 1.2.3", "C:1: proxy_from = 1.2.3: '1.2.3' does not appear to be an "
                                       "IPv4 or IPv6 network"),
                ("deny = 10.0.0.1/8", "C:1: deny = 10.0.0.1/8: 10.0.0.1/8 is one address in a "
                                      "network: for all of it write 10.0.0.0/8"),
                ("resume_rate = fast", "C:1: resume_rate = fast: " + number + ", nor auto"),
                ("resume_rate = -1",
                 "C:1: resume_rate = -1: is not between 0 and 100000, nor auto"),
                ("mush_address = unix:/x\nmush_ssl = yes",
                 "C:2: mush_ssl = yes: there is no TLS over the unix: address in mush_address: "
                 "mend one of the two"),
                ("local_port_ssl = 4300", "C:1: local_port_ssl needs ssl_cert")):
            with self.subTest(line):
                self.assertEqual(self.wrong(line), [message])
        self.assertEqual(self.wrong("local_port = 4000\nlocal_port_ssl = 4000"), [
            "C:1: local_port = 4000: local_port_ssl is the same port",
            "C:2: local_port_ssl needs ssl_cert"])

    def test_a_problem_fits_a_screen_whatever_the_file_holds(self):
        for conf in ("x" * 100000 + " = 1", "mush_address = " + "x" * 100000, "\0" * 100000,
                     "list_heading_notice = " + "x\n " * 100000):
            only, = self.wrong(conf)
            self.assertLess(len(only), 1200)
            self.assertRegex(only, r"\AC:1: .*[a-z0-9`](?:, .*)?\Z")

    def test_a_has_conf_that_is_no_ordinary_file_is_refused_at_once(self):
        os.mkfifo(self.conf)
        self.assertEqual(self.wrong(), ["C: cannot be read: [Errno 22] is no ordinary file: 'C'"])
        os.unlink(self.conf)
        os.symlink("/dev/zero", self.conf)
        self.assertEqual(self.wrong(), ["C: cannot be read: [Errno 22] is no ordinary file: 'C'"])

    def test_has_writes_into_no_file_of_another_kind(self):
        own = ": give it a file of its own"
        for conf, message in (
                ("log_file = has.conf", "log_file = C: that is the file with the settings"),
                ("log_file = x/../has.py", None),
                ("log_file = has.py", "log_file = S: that is HAS itself"),
                ("log_file = has.sock", "log_file = SOCK: that is control_socket"),
                ("control_socket = x\nlog_file = x", "log_file = X: that is control_socket"),
                ("control_socket = has.conf",
                 "control_socket = C: that is the file with the settings"),
                ("ssl_cert = has.py\nlog_file = c", None)):
            with self.subTest(conf):
                problem = "".join(self.wrong(conf) if message else ())
                folder = os.path.dirname(self.conf)
                problem = problem.replace(folder + "/has.sock", "SOCK").replace(folder + "/x", "X")
                self.assertEqual(problem.partition(": ")[2], message + own if message else "")
        os.symlink(self.conf, self.conf + ".link")
        self.assertIn("that is the file with the settings",
                      self.wrong("log_file = has.conf.link")[0])

    def test_bad_lines_of_the_constants_have_exact_messages(self):
        literal = 'only lines like NAME = "text" or NAME = 123 may stand here'
        newer = "if the has.py on disk is newer than the one that runs: kill -USR2"
        at = f"S:{len(self.values) + 3}"            # the two lines before the block, then this line
        for line, message in (
                ("SPEED = 1", "speed: no such setting; " + newer), ("x = 1", literal),
                ("BEATT = 1", "beatt: no such setting; did you mean beat?; " + newer),
                ("BEAT = 11", f"BEAT is set a second time (first at "
                              f"S:{list(self.values).index('beat') + 3}): delete one"),
                ("A = B = 1", literal), ("A: int = 1", literal), ("print(1)", literal),
                ("A = [1]", literal),
                ("A = f'{1}'", literal), ("A = None", literal), ("BEAT += 1", literal)):
            with self.subTest(line):
                self.assertEqual(self.wrong(extra=line), [f"{at}: {message}"])
        self.assertRegex(self.wrong(extra="BEAT = 'x")[0],
                         rf"\A{at}: this is no Python constant: \w")
        self.assertEqual(self.wrong(beat=None),
                         ["S: BEAT is missing from the constants: put it back"])

    def test_nothing_in_the_constants_is_executed(self):
        proof = self.script + ".ran"
        self.assertIn("only lines like", self.wrong(extra=f"BEAT2 = open({proof!r}, 'w')")[0])
        self.assertFalse(os.path.exists(proof))

    def test_missing_or_doubled_marker_lines(self):
        marks = (f"S: the lines {has.BEGIN_MARK!r} and {has.END_MARK!r} must stand there once "
                 "each: put them back")
        for extra in (has.BEGIN_MARK, has.END_MARK):
            self.assertEqual(self.wrong(extra=extra), [marks])
        write_text(self.script, "MUSH_ADDRESS = 'a:1'\n")
        self.assertEqual(has.read_constants(self.script),
                         ({}, [marks.replace("S:", self.script + ":")]))

    def test_all_problems_are_reported_at_once(self):
        lines = {key: line for line, key in enumerate(
            [key for key in self.values if key != "hold"], 3)}
        self.assertEqual(self.wrong("nothing\nbeat = x\n", retry="y", hold=None, max_clients=-1), [
            "S: HOLD is missing from the constants: put it back",
            "C:1: this line is not `key = value`",
            f"S:{lines['retry']}: retry = y: is not a number",
            f"S:{lines['max_clients']}: max_clients = -1: is not between 0 and 1000000",
            "C:2: beat = x: is not a number"])
        # not that HOLD is missing, too
        only, = self.wrong("", extra="HOLD = 2 + f()", hold=None)
        self.assertIn("only lines like NAME", only)

    def test_an_indented_line_continues_a_value_also_one_that_begins_with_a_hash(self):
        settings, _ = self.load("# comment\noffline_notice = # one\n  # two\n\n# comment\n\tthree "
                                "= 3\nbeat = 5\r\n")
        self.assertEqual((settings.offline_notice, settings.beat), ("# one\n# two\nthree = 3", 5))

    def test_has_conf_wins_and_is_remarked_and_may_be_missing(self):
        settings, remarks = self.load()
        self.assertEqual((settings.beat, remarks), (10, [
            f"{self.conf} sets nothing, or is not there: the constants in {self.script} count",
            f"WARNING: {self.script} holds hb_pass and others may read it: "
            f"chmod 600 {self.script}"]))
        settings, remarks = self.load("beat = 3\nmush_type = PennMUSH")
        self.assertEqual((settings.beat, settings.mush_type), (3, "pennmush"))
        self.assertEqual(remarks[0], f"{self.conf} overrides the constants BEAT, MUSH_TYPE")

    def test_quotes_in_has_conf_are_remarked(self):
        settings, remarks = self.load("hb_pass = \"secret\"\nhb_user = O'Neill\noffline_notice = "
                                      "'down' or 'up'\nadmins = 'a'")
        self.assertEqual(settings.hb_pass, '"secret"')
        self.assertEqual([line for line in remarks if "quotes" in line], [
            f"WARNING: {self.conf}:{line}: the quotes around {key} count as a part of it: take "
            f"them away"
            for line, key in ((1, "hb_pass"), (3, "offline_notice"), (4, "admins"))])

    def test_words_with_a_meaning_in_any_case(self):
        settings, _ = self.load("remotehostname_cmd = None\nresume_rate = AUTO")
        self.assertEqual((settings.remotehostname_cmd, settings.resume_rate), ("none", None))
        self.assertEqual(self.load("remotehostname_cmd = Hand")[0].remotehostname_cmd, "Hand")

    def test_a_ca_file_that_is_no_certificate(self):
        self.assertEqual(self.wrong(f"mush_ssl = yes\nmush_ssl_ca = {self.script}"), [
            "C:2: mush_ssl_ca S: holds no usable certificate: NO_CERTIFICATE_OR_CRL_FOUND"])

    def test_a_path_counts_from_the_file_that_names_it(self):
        settings, _ = self.load("log_file = logs/has.log\ncontrol_socket = /run/has.sock")
        self.assertEqual(settings.log_file,
                         os.path.join(os.path.dirname(self.conf), "logs/has.log"))
        self.assertEqual(settings.control_socket, "/run/has.sock")

    def test_the_control_socket_is_found_whatever_else_is_wrong(self):
        for text, path in (("beet = 5\n", self.conf[:-5] + ".sock"),
                           ("nonsense\ncontrol_socket = x.sock\n",
                           os.path.join(os.path.dirname(self.conf), "x.sock"))):
            write_text(self.conf, text)
            self.assertEqual(has.control_path(self.script, self.conf), path)

    def test_hb_pass_is_never_shown(self):
        settings, _ = self.load()
        self.assertEqual(settings.hb_pass, "s3cr3t")
        self.assertNotIn("s3cr3t", f"{settings!r} {settings}")
        for line in ("hb_pass = s3cr3t s3cr3t", "hb_pas = s3cr3t",
                     "hb_pass = s3cr3t\nhb_pass = s3cr3t",
                     "hb_pass = s3cr3t\n s3cr3t", "hb_pass s3cr3t", "hb_pass: s3cr3t"):
            with self.subTest(line):
                self.assertNotIn("s3cr3t", "\n".join(self.wrong(line)))

    def test_a_file_that_is_not_utf8_is_a_problem_not_a_crash(self):
        for where in ({"offline_notice": "caf\xe9"}, {"conf": "offline_notice = caf\xe9"},
                      {"extra": "#\0"}):
            with self.subTest(list(where)), self.assertRaises(has.SettingsError):
                self.load(encoding="latin-1", **where)

    def test_the_own_listener_as_the_world_is_refused(self):
        for local, world, refused in (
                ("", "127.0.0.1:4201", True), ("", "localhost:4201", True),
                ("", "127.0.0.1:4202", False),
                ("", "192.0.2.1:4201", False), ("", "mush.example:4201", False),
                ("", "unix:/tmp/4201", False),
                ("", "a:1, 127.0.0.1:4201", True), ("127.0.0.1", "127.0.0.1:4201", True),
                ("127.0.0.1", "localhost:4201", True), ("127.0.0.1", "127.0.0.2:4201", False),
                ("192.0.2.1", "127.0.0.1:4201", False), ("::1", "[::1]:4201", True),
                ("::1", "127.0.0.1:4201", False),
                ("0.0.0.0", "127.0.0.1:4201", True)):
            with self.subTest(local=local, world=world):
                conf = f"mush_address = {world}\nlocal_address = {local}"
                if refused:
                    own = world.split(", ")[-1]
                    self.assertEqual(self.wrong(conf),
                                     [f"C:1: mush_address = {own}: that is HAS itself (local_port, "
                                      f"local_port_ssl): "
                                                        "give the port of the MUSH"])
                else:
                    self.load(conf)

    def test_the_own_listener_by_another_name(self):
        hosts = self.conf + ".hosts"
        with open(hosts, "w") as file:
            file.write("127.0.0.1 localhost\n127.0.1.1  Mybox.example mybox # elsewhere\n192.0.2.7 "
                       "far\n# 127.0.0.1 off\nx\n")
        patches = mock.patch.object(has, "HOSTS_FILE", hosts), mock.patch("socket.gethostname",
                                                                          lambda: "Thisbox.example")
        for patch in patches:
            patched(self, patch)
        for local, host, refused in (
                ("", "mybox", True), ("", "MYBOX.example.", True), ("", "elsewhere", False),
                ("", "far", False), ("", "off", False),
                ("127.0.0.1", "mybox", False), ("127.0.1.1", "mybox", True),
                ("192.0.2.7", "far", True),
                ("", "thisbox", True), ("", "thisbox.example", True),
                ("127.0.0.1", "thisbox", False),
                ("", "any.localhost", True), ("127.0.0.1", "any.localhost", True),
                ("", "0.0.0.0", True), ("127.0.0.1", "0.0.0.0", True),
                ("192.0.2.1", "0.0.0.0", False), ("::1", "[::]", True),
                ("127.0.0.1", "[::ffff:0:0]", True), ("127.0.0.1", "[::ffff:127.0.0.1]", True)):
            with self.subTest(local=local, host=host):
                conf = f"mush_address = {host}:4201\nlocal_address = {local}"
                if refused:
                    self.assertIn("that is HAS itself", self.wrong(conf)[0])
                else:
                    self.load(conf)
        with mock.patch.object(has, "HOSTS_FILE", hosts + ".gone"):
            self.load("mush_address = mybox:4201")

    def test_the_own_listener_is_refused_over_ipv6(self):
        try:
            with socket.socket(socket.AF_INET6) as trial:
                trial.bind(("::1", 0))
        except OSError:
            self.skipTest("no IPv6 here")
        self.assertIn("that is HAS itself", self.wrong("mush_address = [::1]:4201")[0])

    def test_addresses(self):
        for text, address, shown in (
                ("mush.example:4096", ("mush.example", 4096, None), "mush.example:4096"),
                ("[2001:db8::6]:99", ("2001:db8::6", 99, None), "[2001:db8::6]:99"),
                ("unix:/a b/net.sock", (None, 0, "/a b/net.sock"), "unix:/a b/net.sock")):
            self.assertEqual(tuple(has.parse_address(text)), address)
            self.assertEqual(str(has.parse_address(text)), shown)
        settings, _ = self.load("mush_address = unix:/x, [::2]:1 ,b:2")
        self.assertEqual([str(a) for a in settings.mush_address], ["unix:/x", "[::2]:1", "b:2"])

    def test_the_texts_of_today_are_the_defaults(self):
        shipped = TestFiles().shipped()
        self.assertEqual({key: shipped[key] for key in RARE_NOTICES}, RARE_NOTICES)
        self.assertEqual(set(has.SETTINGS) - set(RARE_NOTICES),
                         {key for key in shipped if key not in RARE_NOTICES})

    def test_what_stands_in_braces_in_a_notice_must_exist(self):
        for key, text, trouble in (
                ("login_brake_notice", "In {minutes} m",
                 "there is no {minutes} in this notice: {seconds} is filled in"),
                ("still_offline_notice", "{Time}",
                 "there is no {Time} in this notice: {time} is filled in"),
                ("reattach_from_notice", "{host}",
                 "there is no {host} in this notice: {old} and {new} are filled in"),
                ("offline_notice", "for {time}",
                 "there is no {time} in this notice: nothing is filled in"),
                ("list_heading_notice", "a b", "must be ten words, one for each column"),
                ("goodbye_notice", "a\tb", "holds control characters")):
            self.assertEqual(self.wrong(f"{key} = {text}"), [f"C:1: {key} = {text}: {trouble}"])
        settings, _ = self.load("offline_notice = {} {\nlogin_brake_notice = {seconds} { "
                                "{seconds}\nfull_notice =")
        self.assertEqual((settings.offline_notice, settings.full_notice), ("{} {", ""))
        self.assertEqual(has.filled(settings.login_brake_notice, seconds="{time}"),
                         "{time} { {time}")

    def test_an_encrypted_ssl_key_is_an_error_and_no_question(self):
        folder = os.path.dirname(self.conf)
        cert, key = certificate(folder)
        subprocess.run(["openssl", "ec", "-aes128", "-passout", "pass:secret",
                        "-in", key, "-out", key + ".aes"], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        tls = f"local_port_ssl = 4242\nssl_cert = {cert}\nssl_key = {key}"
        self.load(tls)
        self.assertEqual(self.wrong(tls + ".aes"), [
            f"C:3: ssl_key {key}.aes: is encrypted, and HAS must start without being asked: "
            f"decrypt it"])


# ---- 2. Telnet

def scan(chunks):
    """What a Scanner makes of `chunks`, neighbouring text joined; and what it still holds."""
    scanner, found = has.Scanner(), []
    for chunk in chunks:
        for is_command, piece in scanner.feed(chunk):
            if found and not is_command and not found[-1][0]:
                found[-1] = (False, found[-1][1] + piece)
            else:
                found.append((is_command, piece))
    return found, scanner.held


class TestScanner(unittest.TestCase):
    CASES = (
        (b"plain text\r\n", [(0, b"plain text\r\n")], b""),
        (b"\r\0\n\r\n", [(0, b"\r\0\n\r\n")], b""),
        (b"a\xff\xffb\xff\xff", [(0, b"a\xff\xffb\xff\xff")], b""),
        (b"\xff\xff\xff\xf9x", [(0, b"\xff\xff"), (1, b"\xff\xf9"), (0, b"x")], b""),
        *[(b"a\xff%c\x18b" % verb, [(0, b"a"), (1, b"\xff%c\x18" % verb), (0, b"b")], b"")
          for verb in (WILL, WONT, DO, DONT)],
        (b"\xff\xfb\xff\xff\xfd\n", [(1, b"\xff\xfb\xff"), (1, b"\xff\xfd\n")], b""),
        *[(b"x\xff%cy" % verb, [(0, b"x"), (1, b"\xff%c" % verb), (0, b"y")], b"")
          # EOR SE NOP AYT GA unknown
          for verb in (0xef, SE, 0xf1, 0xf6, 0xf9, 0)],
        (b"\xff\xfa\x1f\x00P\x00\x18\xff\xf0.",
         [(1, b"\xff\xfa\x1f\x00P\x00\x18\xff\xf0"), (0, b".")], b""),
        (b"\xff\xfa\x1f\xff\xff\xf0\xff\xff\xff\xf0",
         [(1, b"\xff\xfa\x1f\xff\xff\xf0\xff\xff\xff\xf0")], b""),
        (b"\xff\xfa\xff\xf0\xff\xfa\x18\x01\xff\xf0",
         [(1, b"\xff\xfa\xff\xf0"), (1, b"\xff\xfa\x18\x01\xff\xf0")], b""),
        (b"a\xff", [(0, b"a")], b"\xff"),
        (b"a\xff\xfd", [(0, b"a")], b"\xff\xfd"),
        (b"a\xff\xff\xff", [(0, b"a\xff\xff")], b"\xff"),
        (b"a\xff\xfa\x18\x00xterm\xff", [(0, b"a")], b"\xff\xfa\x18\x00xterm\xff"),
        (b"\xff\xfa\x18\xff\xff\xf0", [], b"\xff\xfa\x18\xff\xff\xf0"))

    def test_cases_in_every_split(self):
        for data, expected, held in self.CASES:
            for chunks in splits(data):
                with self.subTest(data=data, chunks=chunks):
                    self.assertEqual(scan(chunks),
                                     ([(bool(c), piece) for c, piece in expected], held))

    def test_random_streams_come_out_as_they_went_in(self):
        fresh = random.SystemRandom().randrange(1 << 32)
        print(f"\nTestScanner: fresh seed {fresh}")
        for seed in (4201, fresh):
            rng = random.Random(seed)
            for _ in range(10000):
                data = bytes(rng.choice(b"\xff\xff\xff\xfa\xf0\xfb\xfd\xf9\x18\x00a\n")
                             for _ in range(rng.randrange(40)))
                cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(5)))
                chunks = [data[a:b] for a, b in zip([0] + cuts, cuts + [len(data)])]
                found, held = scan(chunks)
                self.assertEqual(b"".join(piece for _, piece in found) + held, data, f"seed {seed}")
                self.assertEqual((found, held), scan([data]), f"seed {seed}: {chunks}")
                for is_command, piece in found:
                    self.assertTrue(is_command or b"\xff"
                                    not in has.unescape(piece).replace(b"\xff", b"")
                                    and piece.count(b"\xff") % 2 == 0, (seed, data))

    def test_a_long_subnegotiation_is_passed_on_and_not_held(self):
        data = b"a\xff\xfa\xc9" + b"x\xff\xff\xf0" * 50000 + b"\xff\xf0b"
        for size in (1, 999, 65535):
            scanner, most, out = has.Scanner(), 0, []
            cuts = range(0, len(data), size) if size > 1 else (
                0, *range(has.LONGEST_SB - 500, has.LONGEST_SB + 500))
            for begin, end in zip(cuts, (*cuts[1:], len(data))):
                out += scanner.feed(data[begin:end])
                most = max(most, len(scanner.held))
            self.assertLessEqual(most, has.LONGEST_SB)
            self.assertGreater(most, has.LONGEST_SB - 1000, "it was never near the limit")
            self.assertEqual(b"".join(piece for _, piece in out), data)
            self.assertEqual([out[0], out[-1]], [(False, b"a"), (False, b"b")])
            self.assertTrue(all(is_command is None for is_command, _ in out[1:-1]))

    def test_pieces_of_a_long_subnegotiation_mean_nothing(self):
        for piece in (b"a\xfb\x18", b"\xff\xff\x18", b"abc"):
            agreement = has.Agreement()
            agreement.from_client(piece)
            agreement.from_world(piece)
            self.assertEqual((agreement.client, agreement.world), ({}, {}), piece)
            self.assertEqual(has.Replay(agreement).answer(piece), (b"", piece))

    def test_a_subnegotiation_fed_byte_by_byte_is_searched_only_once(self):
        # searched anew for each byte it takes minutes
        scanner, started = has.Scanner(), time.process_time()
        for value in b"\xff\xfa\xc9" + b"\xff\xff" * 32000 + b"\xff":
            self.assertEqual(scanner.feed(bytes((value,))), [])
            self.assertLess(time.process_time() - started, 20)
        self.assertEqual([len(piece) for _, piece in scanner.feed(b"\xf0")], [64005])

    def test_unfinished_ends_what_an_escape_left_open(self):
        for tail, end in ((b"", b""), (b"text", b""), (b"\x1b[0m", b""), (b"\x1b", b"[0m"),
                          (b"a\x1b[", b"m"), (b"\x1b[1;3", b"m"), (b"\x1b[0 ", b"m"),
                          (b"\x1b]0;tit\x07", b""), (b"\x1b]0;t\x1b\\", b""), (b"\x1bM", b""),
                          (b"\x1b[31mred", b"")):
            self.assertEqual(has.unfinished(tail), end, tail)
        self.assertIn(has.unfinished(b"\x1b]0;tit"), (b"\x07", b"\x1b\\"))
        for opener in b"PX^_":                                  # only ST ends these (ECMA-48 5.6)
            self.assertEqual(has.unfinished(b"\x1b%cdata" % opener), b"\x1b\\", chr(opener))

    def test_unfinished_ends_a_begun_character_set_escape(self):
        self.assertRegex(has.unfinished(b"\x1b("), rb"\A[0-~]")

    def test_shorten_keeps_telnet_and_the_begun_line_and_counts_lines(self):
        line = b"0123456789012345678901234567890123456789012345678901234567890\r\n"
        out = bytearray(b"begun line\r\n" + line * 300 + command(WILL, ECHO) + line * 300)
        lost = 0
        for _ in range(3):
            before = out.count(b"\n")
            out = has.shorten(out + line * 300, 8192, told_of)
            found = re.findall(rb"<output lost: (\d+) lines>\r\n", out)
            self.assertEqual(len(found), 1)
            self.assertEqual(before + 300 - (1 if lost else 0) + lost,
                             int(found[0]) + out.count(b"\n") - 1)
            lost = int(found[0])
            self.assertTrue(out.startswith(b"begun line\r\n"))
            self.assertEqual(out.count(command(WILL, ECHO)), 1)
            self.assertTrue(out.endswith(line))
            self.assertLess(len(out), 8192 + 100)


NAWS_SB, CHARSET_SB = b"\xff\xfa\x1f\x00P\x00\x18\xff\xf0", b"\xff\xfa\x2a\x02UTF-8\xff\xf0"
TYPES = [b"\xff\xfa\x18\x00" + name + b"\xff\xf0" for name in (b"MUDLET", b"XTERM", b"MTTS 9")]
SEND = b"\xff\xfa\x18\x01\xff\xf0"
HELLO, SUPPORTS, LOGIN = (b"\xff\xfa\xc9" + text + b"\xff\xf0" for text in (
    b'Core.Hello {"client":"M"}', b'Core.Supports.Set ["Char 1"]',
    b'Char.Login {"password":"s3cr3t"}'))


def agreed(world=(), client=(), subs=()):
    """An Agreement after these (verb, option) commands of both sides and the client's
    sub-negotiations."""
    agreement = has.Agreement()
    for verb, option in world:
        agreement.from_world(command(verb, option))
    for verb, option in client:
        agreement.from_client(command(verb, option))
    for sub in subs:
        agreement.from_client(sub)
    return agreement


class TestReplay(unittest.TestCase):
    def test_what_is_remembered_is_bounded(self):
        agreement = has.Agreement()
        for option, body in ((NAWS, b"x" * 2000), (TTYPE, b"\0" + b"x" * 2000),
                             (CHARSET, b"\x02" + b"x" * 2000),
                             (GMCP, b"Core.Hello " + b"x" * 2000)):
            agreement.from_client(b"\xff\xfa" + bytes((option,)) + body + b"\xff\xf0")
        self.assertEqual((agreement.naws, agreement.ttypes, agreement.charset, agreement.gmcp),
                         (None, [], None, []))

    def full(self):
        return agreed([(DO, NAWS), (DO, TTYPE), (DO, CHARSET), (WILL, CHARSET),
                       (WILL, GMCP), (WILL, ECHO), (WILL, 3)],
                      [(WILL, NAWS), (WILL, TTYPE), (WILL, CHARSET), (DO, CHARSET),
                       (DO, GMCP), (DO, ECHO), (DO, 3)],
                      [NAWS_SB, *TYPES, CHARSET_SB, HELLO, SUPPORTS, LOGIN])

    def test_opening_says_size_terminal_and_character_set(self):
        self.assertEqual(has.Replay(self.full()).opening(), command(WILL, TTYPE)
                         + command(WILL, NAWS) + NAWS_SB
                         + command(WILL, CHARSET) + command(DO, CHARSET) + CHARSET_SB)
        self.assertEqual(has.Replay(agreed([(DO, NAWS)], [(WONT, NAWS)])).opening(), b"")
        # never agreed
        self.assertEqual(has.Replay(agreed([], [(WILL, NAWS)], [NAWS_SB])).opening(), b"")

    def test_answers_to_what_was_said_unasked_go_no_further(self):
        replay = has.Replay(self.full())
        replay.opening()
        for verb, option in ((DO, NAWS), (DO, TTYPE), (DO, CHARSET), (WILL, CHARSET)):
            self.assertEqual(replay.answer(command(verb, option)), (b"", b""))

    def test_offers_are_answered_from_memory(self):
        replay = has.Replay(self.full())
        for offer, answer in ((command(DO, NAWS), command(WILL, NAWS) + NAWS_SB),
                              (command(DO, TTYPE), command(WILL, TTYPE)),
                              (command(WILL, ECHO), command(DO, ECHO)),
                              # never Char.Login
                              (command(WILL, GMCP), command(DO, GMCP) + HELLO + SUPPORTS),
                              (b"\xff\xfa\x2a\x01;UTF-8\xff\xf0", CHARSET_SB)):
            self.assertEqual(replay.answer(offer), (answer, b""))

    def test_a_second_question_for_the_character_set_is_the_clients_own(self):
        replay, question = has.Replay(self.full()), b"\xff\xfa\x2a\x01;UTF-8\xff\xf0"
        self.assertEqual([replay.answer(question) for _ in range(2)],
                         [(CHARSET_SB, b""), (b"", question)])
        asked_before = agreed()
        asked_before.from_world(question)                           # and the client never answered
        self.assertEqual(has.Replay(asked_before).answer(question), (b"", b""))
        self.assertEqual(has.Replay(agreed()).answer(question), (b"", question))

    def test_terminal_types_come_in_order_and_the_last_again(self):
        replay = has.Replay(self.full())
        self.assertEqual([replay.answer(SEND) for _ in range(5)],
                         [(t, b"") for t in TYPES + TYPES[-1:] * 2])
        self.assertEqual(has.Replay(agreed()).answer(SEND), (b"", SEND))

    def test_the_last_size_counts_and_gmcp_hello_is_kept_once(self):
        bigger = NAWS_SB.replace(b"P", b"Q")
        add, remove = (b"\xff\xfa\xc9Core.Supports.%s []\xff\xf0" % verb
                       for verb in (b"Add", b"Remove"))
        agreement = agreed(subs=[NAWS_SB, bigger, HELLO, SUPPORTS, add, HELLO, remove])
        self.assertEqual((agreement.naws, agreement.gmcp), (bigger, [SUPPORTS, add, HELLO, remove]))
        for _ in range(50):
            agreement.from_client(add)
        self.assertLessEqual(len(agreement.gmcp), 16)

    def test_an_offer_that_the_client_has_not_seen_is_passed_on(self):
        replay = has.Replay(self.full())
        for piece in (command(WILL, 70), command(DO, 39), b"\xff\xf9",
                      b"\xff\xf1", b"\xff\xfa\x46\x01x\xff\xf0"):
            self.assertEqual(replay.answer(piece), (b"", piece))

    def test_an_offer_refused_before_is_refused_again(self):
        replay = has.Replay(agreed([(WILL, 70), (DO, 39)], [(DONT, 70), (WONT, 39)]))
        self.assertEqual(replay.answer(command(WILL, 70)), (command(DONT, 70), b""))
        self.assertEqual(replay.answer(command(DO, 39)), (command(WONT, 39), b""))

    def test_an_offer_never_answered_before_is_swallowed(self):
        self.assertEqual(has.Replay(agreed([(WILL, 70)])).answer(command(WILL, 70)), (b"", b""))

    def test_the_client_consenting_to_an_end_has_not_refused_the_option(self):
        agreement = agreed([(WILL, ECHO)], [(DO, ECHO)])          # a password prompt, and its end
        agreement.from_world(command(WONT, ECHO))
        agreement.from_client(command(DONT, ECHO))
        self.assertEqual(has.Replay(agreement).answer(command(WILL, ECHO)),
                         (b"", command(WILL, ECHO)))
        replay = has.Replay(agreed([(WILL, ECHO)], [(DO, ECHO)]))
        replay.leftovers()
        self.assertEqual(replay.answer(command(WILL, ECHO)), (b"", command(WILL, ECHO)))

    def test_what_was_answered_is_swallowed_when_offered_again(self):
        """But for offers long after: the world was started anew in place, and the client may answer
        for itself."""
        for opening in (True, False):
            replay = has.Replay(self.full())
            opening and replay.opening()
            for verb, option in ((DO, NAWS), (DO, CHARSET), (WILL, CHARSET), (WILL, ECHO)):
                replay.answer(command(verb, option))
                self.assertEqual(replay.answer(command(verb, option)), (b"", b""))
            replay.grow_old()
            self.assertEqual(replay.answer(command(DO, NAWS)), (b"", command(DO, NAWS)))
            self.assertEqual(replay.answer(command(DO, NAWS)), (b"", command(DO, NAWS)))

    def test_what_the_client_must_set_up_anew_is_offered_to_it_as_new(self):
        """HAS does not hold what was said behind the yes: MSDP, ATCP, MXP, whatever comes; a size
        that never came."""
        for option in (69, 200, 91, 93, 222):
            for on, mine, off in ((WILL, DO, WONT), (DO, WILL, DONT)):
                with self.subTest(option=option, on=on):
                    agreement = agreed([(on, option)], [(mine, option)])
                    replay = has.Replay(agreement)
                    self.assertEqual(replay.answer(command(on, option)),
                                     (b"", command(off, option) + command(on, option)))
                    self.assertFalse(
                        agreement.from_client(command({WONT: DONT, DONT: WONT}[off], option)))
                    self.assertTrue(agreement.from_client(command(mine, option)))
                    self.assertEqual(replay.leftovers(), b"")
        self.assertEqual(has.Replay(agreed([(DO, NAWS)], [(WILL, NAWS)])).answer(command(DO, NAWS)),
                         (b"", command(DONT, NAWS) + command(DO, NAWS)))
        for option in (0, 1, 3, 5, 25, 70):             # on or off is all there is to these
            self.assertEqual(
                has.Replay(agreed([(WILL, option)], [(DO, option)])).answer(command(WILL, option)),
                             (command(DO, option), b""))

    def test_a_rejected_charset_and_a_request_of_the_clients_are_said_again(self):
        both = [(DO, CHARSET), (WILL, CHARSET)], [(WILL, CHARSET), (DO, CHARSET)]
        rejected, request = b"\xff\xfa\x2a\x03\xff\xf0", b"\xff\xfa\x2a\x01;UTF-8;\xff\xf0"
        replay = has.Replay(agreed(*both, [rejected]))
        self.assertTrue(replay.opening().endswith(rejected))
        self.assertFalse(replay.agreement.accepted)
        replay = has.Replay(agreed(*both, [request]))
        self.assertTrue(replay.opening().endswith(request))
        accepted = b"\xff\xfa\x2a\x02UTF-8\xff\xf0"
        self.assertEqual(replay.answer(accepted), (b"", b""))
        # to a request the client made itself
        self.assertEqual(replay.answer(accepted), (b"", accepted))
        self.assertEqual(replay.answer(request), (b"", request))        # the world asks, too

    def test_gmcp_that_sets_something_up_is_kept(self):
        def gmcp(text):
            return b"\xff\xfa\xc9" + text + b"\xff\xf0"
        said = [b"Core.Hello {}", b"Core.Supports.Set []", b"Core.Supports.Add [1]",
                b"Core.Supports.Add [2]", b"Comm.Channel.Enable 1", b"Char.Login {secret}",
                b"Char.Skills.Get 1", b"Core.Ping", b"Char.Skills.Get 2", b"IRE.Rift.Request"]
        agreement = agreed(subs=map(gmcp, said[:-1]))
        self.assertFalse(agreement.partly)
        agreement.from_client(gmcp(said[-1]))
        self.assertTrue(agreement.partly)
        kept = [b"Core.Hello {}", b"Core.Supports.Set []", b"Core.Supports.Add [1]",
                b"Core.Supports.Add [2]", b"Comm.Channel.Enable 1", b"Char.Skills.Get 2"]
        self.assertEqual(agreement.gmcp, list(map(gmcp, kept)))

    def test_a_character_set_that_no_world_asked_for_is_volunteered_again(self):
        self.assertEqual(has.Replay(agreed(subs=[CHARSET_SB])).opening(), CHARSET_SB)
        asked = agreed(subs=[CHARSET_SB])
        asked.from_world(b"\xff\xfa\x2a\x01 UTF-8\xff\xf0")         # RhostMUSH asks again
        self.assertEqual(has.Replay(asked).opening(), b"")

    def test_environment_variables_are_given_again(self):
        first, latest, more = (b"\xff\xfa\x27" + text + b"\xff\xf0"
                               for text in (b"\0\0LANG\1C", b"\0\0LANG\1de.UTF-8", b"\2\0A\1B"))
        send = b"\xff\xfa\x27\x01\x00\x03\xff\xf0"
        known = agreed([(DO, 39)], [(WILL, 39)], [first, latest, more])
        replay = has.Replay(known)
        self.assertEqual(replay.opening(), command(WILL, 39) + latest + more)
        self.assertEqual(replay.answer(command(DO, 39)), (b"", b""))
        self.assertEqual([replay.answer(send) for _ in range(2)],
                         [(latest + more, b""), (b"", send)])
        replay = has.Replay(agreed([(DO, 39)], [(WILL, 39)]))
        self.assertEqual((replay.opening(), replay.answer(send)), (b"", (b"", send)))
        self.assertEqual(replay.answer(command(DO, 39)), (b"", command(DONT, 39) + command(DO, 39)))

    def test_gmcp_of_which_has_holds_a_part_only_is_set_up_anew_by_the_client(self):
        offer = command(WILL, GMCP)
        for sub in (b"\xff\xfa\xc9External.Discord.Hello\xff\xf0",
                    b"\xff\xfa\xc9Core.Supports.Set [" + b"1" * 2000 + b"]\xff\xf0"):
            agreement = agreed([(WILL, GMCP)], [(DO, GMCP)], [HELLO, SUPPORTS, LOGIN, sub])
            replay = has.Replay(agreement)
            self.assertEqual(replay.answer(offer), (b"", command(WONT, GMCP) + offer))
            self.assertIs(agreement.from_client(command(DONT, GMCP)), False)
            self.assertIs(agreement.from_client(command(DO, GMCP)), True)
            agreement.from_world(offer)
            agreement.from_client(HELLO)
            self.assertEqual(has.Replay(agreement).answer(offer), (command(DO, GMCP) + HELLO, b""))
        agreement = agreed([(WILL, GMCP)], [(DO, GMCP)],
                           [b"\xff\xfa\xc9Comm.%d x\xff\xf0" % n for n in range(17)])
        self.assertEqual(has.Replay(agreement).answer(offer), (b"", command(WONT, GMCP) + offer))

    def test_the_character_set_that_was_agreed(self):
        for name, codec in ((b"UTF-8", "utf-8"), (b"utf-8", "utf-8"), (b"ISO-8859-1", "iso8859-1"),
                            (b"US-ASCII", "ascii"), (b"CP437", "cp437"), (b"x-unheard-of", "ascii"),
                            (b"\xe9", "ascii"), (b"hex", "ascii"), (b"utf-16", "ascii"),
                            (b"ISO-8859-99", "ascii"), (b"undefined", "ascii"), (b"", "ascii")):
            accepted = b"\xff\xfa\x2a\x02" + name + b"\xff\xf0"
            self.assertEqual(agreed(subs=[accepted]).codec, codec)
            asked = agreed(subs=[b"\xff\xfa\x2a\x01;" + name + b"\xff\xf0"])
            self.assertIsNone(asked.codec)
            asked.from_world(accepted)              # to the client's own request
            self.assertEqual(asked.codec, codec)
        self.assertIsNone(
            agreed(subs=[b"\xff\xfa\x2a\x02UTF-8\xff\xf0", b"\xff\xfa\x2a\x03\xff\xf0"]).codec)
        self.assertIsNone(agreed().codec)

    def test_a_refusal_reaches_only_a_client_that_believed_otherwise(self):
        replay = has.Replay(self.full())
        replay.opening()
        self.assertEqual(replay.answer(command(DONT, NAWS)), (b"", command(DONT, NAWS)))
        self.assertEqual(replay.answer(command(WONT, 70)), (b"", b""))

    def test_leftovers_are_switched_off_echo_first_and_their_answers_swallowed_once(self):
        agreement = agreed([(WILL, 3), (DO, NAWS), (WILL, ECHO)],
                           [(DO, 3), (WILL, NAWS), (DO, ECHO)])
        replay = has.Replay(agreement)
        replay.answer(command(WILL, 3))
        self.assertEqual(replay.leftovers(), command(WONT, ECHO) + command(DONT, NAWS))
        for answer in (command(DONT, ECHO), command(WONT, NAWS)):
            self.assertIs(agreement.from_client(answer), False)
            self.assertIs(agreement.from_client(answer), True)
        self.assertEqual(replay.leftovers(), b"")
        self.assertEqual(has.Replay(agreement).had, {(DO, 3)})


class TestSpelling(unittest.TestCase):
    def test_character_sets(self):
        for text, codec, spelled in (
                ("zur\u00fcck", None, b"zur\xc3\xbcck"),
                ("\u201cIt\u2019s back\u201d \u2014 soon\u2026", None, b'"It\'s back" -- soon...'),
                ("zur\u00fcck", "utf-8", b"zur\xc3\xbcck"),
                ("zur\u00fcck", "iso8859-1", b"zur\xfcck"),
                ("zur\u00fcck", "ascii", b"zuruck"), ("zur\u00fcck", "cp437", b"zur\x81ck"),
                ("\u201cna\u00efve\u201d\u2026", "iso8859-1", b'"na\xefve"...'),
                ("\u043c\u0438\u0440 1", "iso8859-1", b"??? 1"),
                ("\u043c\u0438\u0440", None, "\u043c\u0438\u0440".encode()),
                ("\ud800", None, b"?"), ("\ud800x", "utf-8", b"?x")):
            self.assertEqual(has.Spelling().spell(text, codec), spelled)

    def test_byte_255_is_doubled_lines_end_as_telnet_wants_and_typed_bytes_stay(self):
        spelling = has.Spelling()
        self.assertEqual(spelling.spell("\u00ffa\nb", "iso8859-1", b" \xff\xe9"),
                         b"\xff\xffa\r\nb \xff\xff\xe9")

    def test_markup(self):
        spelling = has.Spelling()
        spelling.marked_up = True
        self.assertEqual(spelling.spell("a<b>&", None, b"<i>"), b"a&lt;b&gt;&amp;&lt;i&gt;")
        for tail, end in ((b"", b""), (b"text", b""), (b"<b>x", b""),
                          (b"<a href=", b">"), (b'<a href="x', b'">'), (b'<a b="c"', b">")):
            self.assertEqual(spelling.end(tail), end, tail)
        self.assertEqual(told_of(b"a\n<b>\n", spelling), b"&lt;output lost: 2 lines&gt;\r\n")
        self.assertEqual(told_of(b"a\n" + told_of(b"b\n" * 5, spelling), spelling),
                         b"&lt;output lost: 6 lines&gt;\r\n")

    def test_colour(self):
        spelling = has.Spelling()
        self.assertEqual((spelling.end(b"text"), told_of(b"\n", spelling)),
                         (b"", b"<output lost: 1 lines>\r\n"))
        spelling.coloured = True
        self.assertEqual((spelling.end(b"\x1b[3"), told_of(b"\n", spelling)),
                         (b"m\x1b[0m", b"\x1b[0m<output lost: 1 lines>\r\n"))

    def test_lines_lost_in_words_of_the_site(self):
        spelling, words = has.Spelling(), "{lines} l\u00ednies\nperdudes"
        once = spelling.lost(b"a\n" * 3, words, "iso8859-1")
        self.assertEqual(once, b"3 l\xednies\r\nperdudes\r\n")
        self.assertEqual(spelling.lost(b"a\n" + once, words, "iso8859-1"),
                         b"4 l\xednies\r\nperdudes\r\n")
        self.assertEqual((spelling.lost(b"a\n", ""), spelling.lost(b"a\n", "lost")),
                         (b"", b"lost\r\n"))


# ---- 3. Dialects, 4. Logins

GOOD, BAD = has.Credentials(b"connect", b"Alice",
                            b"alicepw"), has.Credentials(b"connect", b"Alice", b"wrong")


def finished(family, text, charset=b""):
    """The first line that this family reads in `text`."""
    reader = has.LineReader()
    reader.charset = charset
    return next(line for _, line in reader.lines(DIALECTS[family], text) if line is not None)


def read(family, line):
    """(verb, name, password) of a typed line (the first, where it holds a line end of the family),
    or None."""
    login = DIALECTS[family].read_login(finished(family, line + b"\n"))
    return login and (login.verb, login.name, login.password)


class TestLogin(unittest.TestCase):
    T, P, Y, X, R = FAMILIES
    A = (b"Alice", b"alicepw")
    # typed line, families that take it as a login, (verb, name, password); the others do not
    CASES = (
        (b"connect Alice alicepw", FAMILIES, (b"connect", *A)),
        (b"co Alice alicepw", (P, Y, X, R), (b"co", *A)),
        (b"con Alice alicepw", (P, Y, X, R), (b"con", *A)),
        (b"con Alice alicepw", (T,), (b"connect", *A)),
        (b"c Alice alicepw", (P, R), (b"c", *A)), (b"c Alice alicepw", (T,), (b"create", *A)),
        (b"CONNECT Alice alicepw", (P, R), (b"CONNECT", *A)),
        (b"Connect Alice alicepw", (P, R), (b"Connect", *A)),
        (b"co Alice alicepw", (T,), (b"connect", *A)),
        (b"CONNECT Alice alicepw", (T,), (b"connect", *A)),
        (b"Connect Alice alicepw", (T,), (b"connect", *A)),
        (b"cox Alice alicepw", (Y, X), (b"cox", *A)),
        (b"connectx Alice alicepw", (Y, X), (b"connectx", *A)),
        (b"cd Alice alicepw", (P, Y, X, R), (b"cd", *A)),
        (b"ch Alice alicepw", (P, R), (b"ch", *A)),
        (b"cv Alice alicepw", (P,), (b"cv", *A)), (b"CD Alice alicepw", (P, R), (b"CD", *A)),
        (b"create Alice alicepw", FAMILIES, (b"create", *A)),
        (b"cr Alice alicepw", (P, Y, X, R), (b"cr", *A)),
        (b"cr Alice alicepw", (T,), (b"create", *A)),
        (b"  connect   Alice   alicepw  ", FAMILIES, (b"connect", *A)),
        (b"connect Alice alicepw extra", (P, Y, X, R), (b"connect", *A)),
        (b"connect\tAlice\talicepw", (Y,), (b"connect", *A)),
        (b"\tconnect Alice alicepw", (T, Y, X, R), (b"connect", *A)),
        (b'connect "Mary  Ann" pw', FAMILIES, (b"connect", b"Mary Ann", b"pw")),
        (b'connect " Alice " alicepw', (Y, X, R), (b"connect", *A)),
        (b'connect " Alice " alicepw', (T,), (b"connect", *A)),
        (b'connect " Alice " alicepw', (P,), (b"connect", b"Alice", b'"')),
        (b'connect "" " Alice"alicepw', (P, Y, X, R), (b"connect", *A)),
        (b'connect ""Alice"" alicepw', (T,), (b"connect", b'""Alice""', b"alicepw")),
        (b'connect " Guest7', (T,), (b"connect", b'"', b"Guest7")),
        (b'connect ""Alice"" alicepw', (Y, X, R), (b"connect", *A)),
        (b'connect ""Alice"" alicepw', (P,), (b"connect", b"Alice", b'"')),
        (b'connect "Alice""alicepw', (Y, X, R), (b"connect", *A)),
        (b'connect "Alice""alicepw', (P,), (b"connect", b"Alice", b'"alicepw')),
        (b'connect "Alice" "alicepw', (P, Y, X, R), (b"connect", b"Alice", b'"alicepw')),
        (b'connect "Alice" "alicepw', (T,), (b"connect", b"Alice", b'"alicepw')),
        # else it is one name, without a password
        (b'connect "Alice alicepw', (T,), (b"connect", b'"Alice', b"alicepw")),
        (b'connect "Alice alicepw', (P, Y, X, R), (b"connect", b"Alice alicepw", b"")),
        (b'connect guestx y', (Y, X), (b"connect", b"guest", b"")),
        (b'connect guestx y', (T, P, R), (b"connect", b"guestx", b"y")),
        (b'connect " Guest7', (Y, X), (b"connect", b"guest", b"")),
        (b'connect " Guest7', (P, R), (b"connect", b"Guest7", b"")),
        (b"create guestx y", FAMILIES, (b"create", b"guestx", b"y")),
        (b"connect #5 alicepw", FAMILIES, (b"connect", b"#5", b"alicepw")),
        (b"connect *Alice alicepw", FAMILIES, (b"connect", b"*Alice", b"alicepw")),
        (b"connect Alice p%r[x]{y}\\z;,$#\"=", FAMILIES,
         (b"connect", b"Alice", b"p%r[x]{y}\\z;,$#\"=")),
        (b"connect Alicf\be alicepw\r\n", (P, X, R), (b"connect", *A)),
        # BS is dropped there
        (b"connect Alicf\be alicepw\r\n", (Y,), (b"connect", b"Alicfe", b"alicepw")),
        # it stays in the text
        (b"connect Alicf\be alicepw\r\n", (T,), (b"connect", b"Alicf\be", b"alicepw")),
        (b"connect guest\r\n", (P, Y, X, R), (b"connect", b"guest", b"")),
        (b"co  Guest ", (P, R), (b"co", b"Guest", b"")),
        (b"co  Guest ", (Y, X), (b"co", b"guest", b"")),
        # a try that fails, and is counted, or a guest
        (b"connect Bob", (P, Y, X, R), (b"connect", b"Bob", b"")),
        (b'connect "Bob " ', (Y, X, R), (b"connect", b"Bob", b"")),
        (b'connect "Bob " ', (P,), (b"connect", b"Bob", b'"')),
        (b'connect "Bob " ', (T,), (b"connect", b'"Bob', b'"')),
        (b"connect Carol \xe6\x97\xa5\xe6\x9c\xac", (Y,), (b"connect", b"Carol", b"")),
        (b'connect "Bob  Ann', (P, Y, X, R), (b"connect", b"Bob Ann", b"")),
        (b'connect "Bob  Ann', (T,), (b"connect", b'"Bob', b"Ann")),
        (b"create Bob", (), None),
        (b"connect Carol \xe6\x97\xa5\xe6\x9c\xac", (P, X, R),
         (b"connect", b"Carol", b"\xe6\x97\xa5\xe6\x9c\xac")),
        (b"connect Alice alicepx\x7fw\r\n", (Y, X, R), (b"connect", *A)),
        (b"connect Alice alicepx\x7fw\r\n", (T,), (b"connect", b"Alice", b"alicepx\x7fw")),
        (b"connect Alice alicepx\x7fw\r\n", (P,), (b"connect", b"Alice", b"alicepx?w")),
        (b"connect Alice alice\0pw\r\n", (Y, X, R), (b"connect", *A)),
        (b"connect Alice alice\0pw\r\n", (T,), (b"connect", b"Alice", b"alice\0pw")),
        (b"connect Alice alice\0pw\r\n", (P,), (b"connect", b"Alice", b"alice")),
        (b"connect Alice alice\rpw\r\n", (T, X, R), (b"connect", *A)),
        # a CR ends the line
        (b"connect Alice alice\rpw\r\n", (P, Y), (b"connect", b"Alice", b"alice")),
        (b"connect Alice caf\xc3\xa9", (T, P, X, R), (b"connect", b"Alice", b"caf\xc3\xa9")),
        (b"connect Alice caf\xc3\xa9", (Y,), (b"connect", b"Alice", b"caf")))

    def test_login_lines_as_each_family_reads_them(self):
        expected_nowhere = {(line, family): None for line, _,
                            _ in self.CASES for family in FAMILIES}
        expected = {(line, family): login for line, families,
                    login in self.CASES for family in families}
        for (line, family), login in {**expected_nowhere, **expected}.items():
            with self.subTest(family=family, line=line):
                self.assertEqual(read(family, line), login)

    def test_lines_that_are_no_logins(self):
        for family in (*FAMILIES, "plain"):
            for line in (b"", b"connect", b"create Alice", b"connect  ", b'connect "',
                         b"WHO", b"QUIT", b"say connect A b", b"guest a b",
                         b"help", b"xconnect Alice alicepw", b"connect=Alice"):
                with self.subTest(family=family, line=line):
                    self.assertIsNone(read(family, line))
        self.assertIsNone(read("plain", b"connect Alice alicepw"))

    def test_bytes_inside_a_line_as_each_family_reads_them(self):
        self.assertEqual(read("teenymush", b"connect Alice alicepw\r\0\n"),
                         (b"connect", b"Alice", b"alicepw\0"))
        self.assertEqual(read("teenymush", b"connect Alicf\be alicepw\n"),
                         (b"connect", b"Alicf\be", b"alicepw"))
        self.assertEqual(read("tinymux", b'connect "Alice"alicepw'), (b"connect", *self.A))
        for line in (b"connect\tAlice alicepw", b"con\xffnect Alice alicepw"):
            self.assertIsNone(read("teenymush", line), line)

    def test_a_tab_is_no_separator_on_pennmush(self):
        self.assertEqual(read("pennmush", b"connect Alice\talicepw"),
                         (b"connect", b"Alice?alicepw", b""))
        self.assertNotEqual(read("pennmush", b"connect Alice alicepw\tx"), (b"connect", *self.A))

    def test_line_ends(self):
        for family, parts in (("teenymush", 2), ("tinymux", 2), ("rhostmush", 2),
                              ("pennmush", 4), ("tinymush", 4)):
            self.assertEqual(len(DIALECTS[family].line_end.split(b"a\rb\r\nc\r")), parts, family)

    def test_rubbing_out(self):
        for typed, left in ((b"ab\bc", b"ac"), (b"\b\bab", b"ab"), (b"abc\b\b\b\bd", b"d"),
                            (b"ab\x7f\bc", b"c"), (b"a\bb\bc\b", b""), (b"no", b"no")):
            self.assertEqual(has.rub_out(typed), left)
        self.assertEqual(has.rub_out(b"ab\bc\x7f", b"\b"), b"ac\x7f")

    def test_quit_and_logout_by_family_and_place(self):
        T, P, Y, X, R = (frozenset((f,)) for f in FAMILIES)
        for line, playing, login, logout in (
                (b"QUIT", FAMILIES, FAMILIES, ()), (b"quit", T | Y | X | R, T | R, ()),
                (b"Quit", T | Y | X, T, ()), (b"QUIT now", T | Y | X | R, T | Y | X | R, ()),
                (b"qui", (), T, ()), (b"quitx", (), (), ()), (b"say QUIT", (), (), ()),
                (b"LOGOUT", (), Y | X | R, P | Y | X | R), (b"logout", (), R, Y | X | R),
                (b"Logout", (), (), Y | X),
                (b"LOGOUT now", (), Y | X | R, Y | X | R)):
            for family in FAMILIES:
                dialect = DIALECTS[family]
                with self.subTest(family=family, line=line):
                    self.assertEqual(tuple(bool(rule.match(line)) for rule in (
                        dialect.quit_playing, dialect.quit_login, dialect.logout)),
                        tuple(family in where for where in (playing, login, logout)))

    def test_handover_words_are_seen_through_every_disguise(self):
        teeny, rhost = b"@remotehostname", b"PROXY"
        for line in (teeny + b" h=1", b"  @RemoteHostname h", b"@remote h", b"@re h",
                     b"@remo\0tehostname h", b"@remo\rtehostname h", b"@remotx\behostname h",
                     b"@remote\xff\xc3hostname h", teeny + b"=h", b"\t@remotehostname h",
                     b"@remo\x01tehostname h"):
            self.assertTrue(DIALECTS["teenymush"].is_handover(line, "auto"), line)
            self.assertTrue(DIALECTS["teenymush"].is_handover(line, "none"), line)
        for line in (rhost + b" TCP4 1.2.3.4 127.0.0.1 1 2", b"  proxy x",
                     b"PR\0OXY x", b"PROXZ\x7fY x", b"PROXZ\bY x",
                     b"PRO\tXY x", b"PRO\xc3\xa9XY x", b"PRO\rXY x"):
            cleaned = finished("rhostmush", line + b"\n")
            self.assertTrue(DIALECTS["rhostmush"].is_handover(cleaned, "none"), line)
        for family in FAMILIES:
            self.assertTrue(DIALECTS[family].is_handover(b"SecretWord 1.2.3.4", "secretword"),
                            family)
            for line in (b"connect Alice alicepw", b"WHO", b"", b"QUIT",
                         b"say @remotehostname x", b"secret x"):
                self.assertFalse(DIALECTS[family].is_handover(line, "secretword"), (family, line))

    def test_address_lines(self):
        for family, arguments, line in (
                ("teenymush", ("203.0.113.9", 17, "auto", None),
                 b"@remotehostname 203.0.113.9=17\r\n"),
                ("teenymush", ("203.0.113.9", 0, "@rh", None), b"@rh 203.0.113.9\r\n"),
                ("pennmush", ("203.0.113.9", 17, "auto", "/net.sock"),
                 b"203.0.113.9^203.0.113.9\r\n"),
                ("pennmush", ("203.0.113.9", 17, "auto", None), b""),
                ("tinymush", ("1.2.3.4", 1, "auto", None), b""),
                ("tinymux", ("1.2.3.4", 1, "auto", None), b""),
                ("plain", ("1.2.3.4", 1, "auto", None), b""),
                ("rhostmush", ("203.0.113.9", 17, "auto", None),
                 b"PROXY TCP4 203.0.113.9 127.0.0.1 1 2\r\n"),
                ("rhostmush", ("2001:db8::6", 17, "auto", None),
                 b"PROXY TCP6 2001:db8::6 ::1 1 2\r\n"),
                ("rhostmush", ("203.0.113.9", 17, "sesame", None), b"sesame 203.0.113.9\r\n")):
            self.assertEqual(DIALECTS[family].address_line(*arguments), line)

    def test_a_login_at_a_world_never_seen_is_kept_whatever_its_family_will_be(self):
        for line in (b"connect Alice pw", b"co Alice pw", b"c Alice pw", b"CD Alice pw",
                     b"ch Alice pw", b"cv Alice pw", b"create Alice pw", b" c Alice pw"):
            login = has.UNKNOWN.read_login(line)
            self.assertEqual((login.name, login.password), (b"Alice", b"pw"), line)
        for line in (b"c", b"look Alice pw", b"call Alice pw"):
            self.assertIsNone(has.UNKNOWN.read_login(line), line)


class TestHostileLines(unittest.TestCase):
    """No line a user can type may hold up the main thread (one chunk is 64 KiB; the limit is
    generous)."""

    def quick(self, call, *arguments):
        started = time.process_time()
        call(*arguments)
        self.assertLess(time.process_time() - started, 1)

    def test_rubbing_out_is_linear(self):
        self.quick(has.rub_out, b"a" * 8000 + b"\b" * 8000)

    def test_a_name_change_of_blanks_is_read_quickly(self):
        self.quick(DIALECTS["pennmush"].name_typed.match, b"@name " + b" " * 1200 + b"x")

    def test_a_password_change_of_blanks_is_read_quickly(self):
        for family in FAMILIES:
            self.quick(DIALECTS[family].password_typed.match, b"@password " + b" " * 40000 + b"x")

    def test_a_setting_of_blanks_is_read_quickly(self):
        self.quick(DIALECTS["pennmush"].setting_words.match, b"OUTPUTPREFIX a"
                   + b" " * 16000 + b"b")

    def test_login_and_address_lines_are_read_quickly(self):
        for family in FAMILIES:
            for line in (b" " * 16000 + b"c", b"connect " + b" " * 16000,
                         b'connect "' + b"a" * 16000, b"@" + b" " * 16000):
                self.quick(DIALECTS[family].read_login, line)
                self.quick(DIALECTS[family].is_handover, line, "auto")


def evaluate(code):
    """A softcode evaluator that knows escapes only; anything special that is not escaped is an
    injection."""
    out, at = b"", 0
    while at < len(code):
        if code[at:at + 1] == b"\\" and at + 1 < len(code):
            out, at = out + code[at + 1:at + 2], at + 2
        elif code[at:at + 2] in (b"%b", b"%t"):
            out, at = out + {b"%b": b" ", b"%t": b"\t"}[code[at:at + 2]], at + 2
        elif code[at] < 128 and not code[at:at + 1].isalnum():
            raise AssertionError(f"{code!r} is evaluated at {at}")
        else:
            out, at = out + code[at:at + 1], at + 1
    return out


class TestChecks(unittest.TestCase):
    ARGUMENT = rb"((?:\\[^a-zA-Z0-9]|%[bt]|[A-Za-z0-9\x80-\xff])*)"

    def test_every_byte_and_every_dangerous_pair_comes_out_literally(self):
        nasty = [bytes((n,)) for n in b"%\\[]{}(),;$#\"^<>'`~!&=|*@ \tbtrq0x"]
        for text in [chr(n).encode() for n in range(256)] + [bytes((n,)) for n in range(256)] + [
                a + b for a in nasty for b in nasty] + [b"x),shutdown(",
                                                        b"[name(me)]", b"a\\", b"50%off", b""]:
            escaped = has.escape_softcode(text)
            if escaped is None:
                # control bytes, no UTF-8
                self.assertRegex(text, rb"[\x00-\x08\x0a-\x1f\x7f-\xff]")
            else:
                self.assertEqual(evaluate(escaped), text)
                self.assertRegex(escaped, rb"\A" + self.ARGUMENT + rb"\Z")

    def test_what_cannot_be_passed_is_refused(self):
        for text in [bytes((n,)) for n in range(32) if n != 9] + [b"\x7f", b"a\n", b"\xff",
                                                                  "\u65e5".encode(), b"a\0b"]:
            self.assertIsNone(has.escape_softcode(text), text)
            self.assertIsNone(DIALECTS["rhostmush"].check(
                [GOOD, has.Credentials(b"connect", b"A", text)], b"=N="))
        self.assertEqual(has.escape_softcode("caf\xe9".encode()), "caf\xe9".encode())

    def test_a_check_asks_with_two_literal_arguments(self):
        for family, function in (("teenymush", b"password"), ("rhostmush", b"checkpass")):
            for name, password in ((b"Mary Ann", b"x),shutdown("), (b"*Al[i]", b"a\\"),
                                   (b"#5", b"%#,%0")):
                line = DIALECTS[family].check([has.Credentials(b"co", name, password)] * 2, b"=N=")
                calls = re.fullmatch(rb"think =N= (.+) =N=\r\n", line, re.S).group(1)
                call = (rb"\[" + function + rb"\((\*?)" + self.ARGUMENT + b"," + self.ARGUMENT
                        + rb"\)\]")
                star, who, what = re.fullmatch(call, calls[:len(calls) // 2]).groups()
                self.assertEqual(calls[len(calls) // 2:len(calls) // 2 + 1], b":")
                self.assertEqual((evaluate(who), evaluate(what)), (name.lstrip(b"*"), password))
                self.assertEqual(star, b"" if name == b"#5" else b"*")
        for family in ("tinymush", "tinymux", "plain"):
            self.assertIsNone(DIALECTS[family].check([GOOD], b"=N="))

    def test_pennmush_is_asked_in_base64_only(self):
        penn = DIALECTS["pennmush"]
        self.assertEqual(penn.check([GOOD], b"=N="),
                         b"think =N= [checkpass(*[decode64(QWxpY2U=)],decode64(YWxpY2Vwdw==))] "
                         b"=N=\r\n")
        self.assertEqual(penn.check_call(has.Credentials(b"c", b"#5", b"a")),
                         b"[checkpass(#5,decode64(YQ==))]")
        for n in range(33, 127):
            call = penn.check_call(has.Credentials(b"c", b"#1]%c" % n, b"p%c" % n))
            self.assertRegex(call,
                             rb"\A\[checkpass\(\*\[decode64\([A-Za-z0-9+/=]+\)\],"
                             rb"decode64\([A-Za-z0-9+/=]+\)\)\]\Z")
        self.assertIsNone(penn.check_call(has.Credentials(b"c", b"Alice", "caf\xe9".encode())))

    def test_verdicts(self):
        self.assertEqual(has.Dialect.verdicts(b"1:0:#-1 NO MATCH:#-1 NO SUCH OBJECT:#-1 PERMISSION "
                                              b"DENIED:"
                                              b"#-1 FUNCTION (CHECKPASS) NOT FOUND:"),
                         [True, False, False, False, None, None, False])

    def test_credentials_show_nothing(self):
        pair = has.Credentials(b"connect", b"Alice", b"s3cr3t")
        try:
            raise ValueError(pair)
        except ValueError:
            shown = traceback.format_exc()
        shown += f"{pair!r} {pair} {[pair]} " + "%s %r" % (pair, pair)
        self.assertNotRegex(shown, "s3cr3t|Alice")
        self.assertEqual(pair, has.Credentials(b"cd", b"ALICE", b"s3cr3t"))
        self.assertNotEqual(pair, has.Credentials(b"connect", b"Alice", b"S3cr3t"))
        self.assertEqual(has.Credentials(b"cd", b"Mary Ann", b"x").line(), b'cd "Mary Ann" x')
        self.assertEqual(has.Credentials(b"co", b"*Alice", b"x").character, b"alice")

    def test_worlds_are_recognised(self):
        info = (b"### Begin INFO 1\r\nName: AnonyMUSH\r\nUptime: Sat Nov 21 23:20:59 2026\r\n"
                b"Version: %s\r\n### End INFO\r\n")
        for banner, version, name in (
                (b"\xff\xfd\"", b"PennMUSH 1.8.8p0", "pennmush"), (b"", b"4.0.0.817-0", "tinymush"),
                (b"\xff\xfb\x19Welcome", b"MUX 2.12.0.10", "tinymux"),
                (b"", b"RhostMUSH 5.8.4", "rhostmush"),
                (b"\xff\xfb\x03\xff\xfd\x1f\xff\xfd\x18\xff\xfbFMy game", None, "teenymush"),
                (b"Welcome to TeenyMUSH\r\n", None, "teenymush"), (b"Welcome to MyMUD", None, None),
                (b"", b"Zork", None),
                (b"We came here from TeenyMUSH.", b"PennMUSH 1.8.8p0", "pennmush")):
            found = has.recognise(banner, info % version if version else b"")
            self.assertEqual(found and found.name, name, (banner, version))
        status = b"NAME\x02X\x01UPTIME\x021795309455\x01CODEBASE\x02TeenyMUSH 0.91"
        self.assertEqual(has.recognise(b"", status).name, "teenymush")

    def test_start_ids(self):
        answer = has.PennMUSH.start_answer
        self.assertEqual(answer.search(
            b"### Begin\r\nUptime: Sat 1\r\nSize: 7\r\n### End INFO\r\n").group(1), b"Sat 1")
        self.assertIsNone(answer.search(b"Uptime: Sat 1\r\nSize: 7\r\n"))
        self.assertEqual(has.TeenyMUSH.start_answer.search(b"\x01UPTIME\x021795309455\x01").group(
            1), b"1795309455")


class TestChanges(unittest.TestCase):
    def test_changes_of_password_as_typed(self):
        everywhere, info, penn = FAMILIES, FAMILIES[1:], ("pennmush",)
        for line, families, new in (
                (b"@password old=new", everywhere, b"new"),
                (b"@PASSWORD old= new ", everywhere, b"new"),
                (b"@pass old=new", everywhere, b"new"), (b"@pas old=new", penn, b"new"),
                (b"@password a=b=c", info, b"b=c"),
                (b"@newpassword me=new", ("teenymush",), b"new"),
                (b"@newpassword Bob=new", (), None),
                (b"@password old=", (), None), (b"@password old", (), None),
                (b"say @password old=new", (), None)):
            for family in everywhere:
                if line == b"@password a=b=c" and family == "teenymush" or line.startswith(
                    b"@pas ") and family not in penn:
                    continue                    # not recorded
                found = DIALECTS[family].password_typed.match(line)
                with self.subTest(family=family, line=line):
                    self.assertEqual(found and found.group(1), new if family in families else None)

    def test_changes_of_name_as_typed(self):
        for line, who, new in ((b"@name me=New", b"me", b"New"),
                               (b"@name *Old = New Name ", b"Old", b"New Name"),
                               (b'@NAME Old="Bob"', b"Old", b"Bob"),
                               (b"@name me=Rob;x", b"me", b"Rob")):
            self.assertEqual(has.PennMUSH.name_typed.match(line).groups(), (who, new))
        self.assertIsNone(has.PennMUSH.name_typed.match(b"@name me"))
        for word in (b"@na", b"@nam", b"  @NA"):
            self.assertTrue(has._WATCHED.match(word + b" me=x"))
            self.assertTrue(has.TinyMUX.name_typed.match(word.strip() + b" me=x"))

    def test_the_words_of_each_family_for_done_and_refused(self):
        P, info = ("pennmush",), ("tinymush", "tinymux", "rhostmush")
        for text, families, done, kept in (
                (b"Password changed.", ("teenymush", *info), "password_changed", "password_kept"),
                (b"The password for Alice has been updated.", ("teenymush",
                 ), "password_changed", "password_kept"),
                (b"You have changed your password.", P, "password_changed", "password_kept"),
                (b"Name set.", P + info, "name_changed", "name_kept"),
                (b"Set.", ("teenymush",), "name_changed", "name_kept"),
                (b"Sorry.", info, "password_kept", "password_changed"),
                (b"Null passwords are not allowed.", info[:2], "password_kept", "password_changed"),
                (b"Bad new password.", P + info[2:], "password_kept", "password_changed"),
                (b"The old password that you entered was incorrect.",
                 P, "password_kept", "password_changed"),
                (b"Invalid old password.", ("teenymush",), "password_kept", "password_changed"),
                (b"usage: @password <old_password> = <new_password>",
                 ("teenymush",), "password_kept", "password_changed"),
                (b"That name is already in use", FAMILIES, "name_kept", "name_changed"),
                (b"You can't give a player that name or alias.", P, "name_kept", "name_changed"),
                (b"Alice says, \"Name set.\"", (), "name_changed", "name_kept")):
            for family in families or FAMILIES:
                with self.subTest(family=family, text=text):
                    self.assertEqual(bool(getattr(DIALECTS[family], done).match(text)),
                                     bool(families))
                    self.assertFalse(getattr(DIALECTS[family], kept).match(text))

    def test_settings_of_a_connection(self):
        for line, groups in ((b"OUTPUTPREFIX =x y=", (b"OUTPUTPREFIX", b"=x y=")),
                             (b"OUTPUTSUFFIX", (b"OUTPUTSUFFIX", None)),
                             (b"SCREENWIDTH 100 ", (b"SCREENWIDTH", b"100")),
                             (b"SOCKSET COLORSTYLE=xterm256",
                              (b"SOCKSET", b"COLORSTYLE=xterm256"))):
            self.assertEqual(has.PennMUSH.setting_words.match(line).groups(), groups)
        self.assertIsNone(has.PennMUSH.setting_words.match(b"outputprefix x"))
        self.assertIsNone(has.TeenyMUSH.setting_words.match(b"OUTPUTPREFIX x"))


class TestChange(unittest.TestCase):
    def test_the_answer_is_a_whole_line_however_it_comes(self):
        penn = DIALECTS["pennmush"]
        for kind, answers in (("password", ((b"You have changed your password.\r\n", True),
                                            (b"Bad new password.\r\n", False))),
                              ("name",
                               ((b"Name set.\r\n", True),
                                (b"You can't give a player that name or alias.\r\n", False)))):
            for text, expected in answers:
                for cut in range(len(text)):
                    change = has.Change(kind, b"new", 0)
                    self.assertIsNone(change.outcome(penn, b"Bob says, \""
                                                     + text + b"\r\n" + text[:cut]))
                    self.assertIs(change.outcome(penn, text[cut:]), expected)

    def test_the_answer_to_an_earlier_line_is_none(self):
        for family in FAMILIES:
            done = {"teenymush": b"Password changed.", "pennmush": b"You have changed your "
                                                                   b"password."}.get(
                                                                       family, b"Password changed.")
            change = has.Change("password", b"new", 0)
            earlier = (b'Huh?  (Type "help" for help.)\r\nHuh? (Type "HELP" for help.)\r\n'
                       b'Permission denied.\r\n')
            self.assertIsNone(change.outcome(DIALECTS[family], earlier), family)
            self.assertIs(change.outcome(DIALECTS[family], earlier + done + b"\r\n"), True, family)

    def test_the_answer_to_an_eraser_stands_in_front(self):
        for echo in (b" \b", b"\b \b", b"\b \b \b", b""):
            change = has.Change("name", b"new", 0)
            self.assertIs(change.outcome(DIALECTS["tinymux"], echo + b"Name set.\r\n"), True)

    def test_a_name_and_a_password_at_once(self):
        old = has.Credentials(b"connect", b"Alice", b"pw")
        changed, kept = b"Password changed.\r\n", b"Sorry.\r\n"
        for name, password, expected in (
                (b"Name set.\r\n", kept + changed, (b"Eve", b"new")),
                (b"Name set.\r\n", kept + kept, (b"Eve", b"pw")),
                (b"You can't use that name.\r\n", kept + changed, (b"Alice", b"new")),
                (b"Name set.\r\n", changed + kept, (b"Eve", b"first")),
                (b"Name set.\r\n", changed + changed, (b"Eve", b"new")),
                (b"", kept + changed, (b"Alice", b"new")),
                (b"Name set.\r\n", b"", (b"Eve", b"pw"))):
            for texts in ([name + password], [name, password]):
                character = has.Character()
                character.login = old
                character.change("name", b"Eve", 0)
                character.change("password", b"first", 0)
                character.change("password", b"new", 0)
                for text in texts:
                    if character.changing:
                        character.follow_change(DIALECTS["tinymux"], text)
                self.assertEqual((character.login.name, character.login.password), expected)
                self.assertEqual(bool(character.changing), not (name and password))
                if len(texts) == 1:
                    self.assertEqual(character.previous, old)

    def test_the_world_answers_in_order_however_that_comes(self):
        text = b"Sorry.\r\nPassword changed.\r\nSorry.\r\nPassword changed.\r\nSorry.\r\n"
        for cut in range(len(text) + 1):
            character = has.Character()
            character.login = has.Credentials(b"connect", b"Alice", b"0")
            for number in range(5):
                character.change("password", b"%d" % (number + 1), 0)
            for part in (text[:cut], text[cut:]):
                if part:
                    character.follow_change(DIALECTS["tinymux"], part)
            self.assertEqual((character.login.password, character.changing), (b"4", None), cut)

    def test_changes_without_end_take_no_room(self):
        character = has.Character()
        character.login = has.Credentials(b"connect", b"Alice", b"0")
        for number in range(1000):
            character.change("password", b"%d" % (number + 1), 0)
        character.follow_change(DIALECTS["tinymux"], b"Password changed.\r\n" * 1000)
        self.assertEqual(character.login.password, b"%d" % (has.Change.MOST_BEHIND + 1))

    def test_what_becomes_of_the_login(self):
        old = has.Credentials(b"cd", b"Alice", b"one")
        for change, name, password in ((has.Change("password", b"two", 0), b"Alice", b"two"),
                                       (has.Change("name", b"Alicia", 0), b"Alicia", b"one")):
            new = change.of(old)
            self.assertEqual((new.verb, new.name, new.password), (b"cd", name, password))
        self.assertEqual((old.name, old.password), (b"Alice", b"one"))


class TestNoise(unittest.TestCase):
    def test_lines_about_the_expected_are_removed_and_no_others(self):
        noise = has.Noise()
        self.assertFalse(noise)
        noise.expect(b"alice", 5)
        noise.expect(b"bob b", 7)
        text = (b"Alice has connected.\r\nCarol has connected.\r\nBob B has reconnected.\n"
                b"He says Alice has connected.\r\nALICE has partially disconnected.\r\nAlice has "
                b"left.\r\n")
        self.assertEqual(noise.removed(text), b"Carol has connected.\r\nHe says Alice has "
                                              b"connected.\r\nAlice has left.\r\n")

    def test_beginnings_of_such_lines(self):
        noise = has.Noise()
        self.assertFalse(noise.may_begin(b"Al"))
        noise.expect(b"alice", 5)
        for tail, possible in ((b"", False), (b"A", True), (b"Alice", True),
                               (b"alice has conn", True), (b"Alicia", False),
                               (b"Carol has conn", False), (b"Alice has " + b"x" * 80, False)):
            self.assertEqual(noise.may_begin(tail), possible, tail)

    def test_expectations_end(self):
        noise = has.Noise()
        noise.expect(b"alice", 5)
        noise.expect(b"bob", 7)
        self.assertEqual(noise.forget(5), 7)
        self.assertEqual(noise.removed(b"Alice has connected.\n"), b"Alice has connected.\n")
        self.assertIsNone(noise.forget(7))
        self.assertFalse(noise)


NO = b"Either that player does not exist, or has a different password.\r\n"
TABLE = (b"Characters Input----\r\nPlayer Name  On For Idle Port Pend  Lost     Total\r\n"
             b"Alice  0  1 2\r\n")
INFO = b"### Begin INFO 1\r\nUptime: x\r\n### End INFO\r\n"
SHOWN = {                          # what a user sees of a login: (right, wrong)
    "teenymush": (b"[ MOTD ]\n\nLast connect was from h on Sat\n\nMAIL: none\n",
                  NO.replace(b"\r", b"")),
    "pennmush": (b"Last connect was from h\r\nLimbo\r\n", b"That is not the correct password.\r\n"),
    **{family: (b"MOTD\r\nLimbo\r\n", NO) for family in ("tinymush", "tinymux", "rhostmush")}}
MARKS = {                          # and what comes behind it of the marks: (right, wrong)
    "teenymush": (b"", b""), "pennmush": (b"Na\r\nNz\r\n", b""), "tinymush": (b"N\r\n", b""),
         "tinymux": (b"N\r\n", b""),
    "rhostmush": (b"Na\r\n" + TABLE + b"Nz\r\n", b"Na\r\nNz\r\n")}
END = {"pennmush": b"Ne\r\n", "tinymush": INFO, "tinymux": INFO, "rhostmush": b"", "teenymush": b""}


def nonce(number=0):
    """The nonce of the login line with this number (the tests have taken the randomness out)."""
    return b"=0123abcd%02x=" % number


def answer(family, right, number=0, end=b""):
    """What the server sends: its login text, its marks and `end`."""
    marks = re.sub(rb"\bN([aze]?)\r", nonce(number) + rb"\1\r", MARKS[family][not right] + end)
    return SHOWN[family][not right] + marks


class TestProof(unittest.TestCase):
    def setUp(self):
        patched(self, mock.patch("has.secrets.token_hex", lambda size: "0123abcd"))

    @staticmethod
    def typed(family, *logins):
        """A Proof that wrapped `logins`."""
        proof = has.proof_for(DIALECTS[family])
        for login in logins:
            proof.wrap(login, login.line() + b"\r\n", {})
        return proof

    def test_the_bytes_around_a_login_line(self):
        own = {b"OUTPUTPREFIX": b"P", b"OUTPUTSUFFIX": b"S"}
        both = b"OUTPUTPREFIX N%s\r\nOUTPUTSUFFIX N%s\r\n%s\r\nOUTPUTPREFIX p\r\nOUTPUTSUFFIX s\r\n"
        for family, before, behind in (
                ("teenymush", b"", b""),
                ("pennmush", b"OUTPUTPREFIX Nf\r\n \r\nOUTPUTPREFIX p\r\n",
                 both % (b"a", b"z", b" ")),
                ("tinymush", b"OUTPUTSUFFIX Nf\r\nOUTPUTSUFFIX s\r\n",
                 b"OUTPUTSUFFIX N\r\nOUTPUTSUFFIX s\r\n"),
                ("tinymux", b"OUTPUTPREFIX Nf\r\nOUTPUTPREFIX N\r\n", b"OUTPUTPREFIX p\r\n"),
                ("rhostmush", both % (b"b", b"y", b"SESSION"), both % (b"a", b"z", b"SESSION"))):
            for settings, prefix, suffix in (({}, b"", b""), (own, b" P", b" S")):
                sent = has.proof_for(DIALECTS[family]).wrap(GOOD, b"co A p\r\n", settings)
                expected = before + b"co A p\r\n" + behind
                expected = expected.replace(b"X p\r", b"X" + prefix + b"\r")
                expected = expected.replace(b"X s\r", b"X" + suffix + b"\r")
                self.assertEqual(re.sub(rb"=[0-9a-f]{10}=", b"N", sent), expected, family)

    def test_a_login_is_proven_or_not_and_the_marks_are_not_seen_in_every_split(self):
        for family in FAMILIES:
            for right in (True, False):
                prompts = [b"", b"\r\n", b"= not a mark =0123 \r\n", b"no end of line "]
                for prompt in prompts[:3 if family == "teenymush" else 4]:
                    shown = prompt + SHOWN[family][not right] + b"end"
                    for chunks in splits(prompt + answer(family, right) + b"end"):
                        proof = self.typed(family, GOOD)
                        self.assertEqual(b"".join(map(proof.feed, chunks)), shown, (family, chunks))
                        self.assertIs(proof.login, GOOD if right else None, (family, chunks))

    def test_a_mark_directly_behind_text_without_an_end_of_line(self):
        for family in FAMILIES[1:]:
            for chunks in splits(b"prompt> " + answer(family, True)[len(SHOWN[family][0]):]):
                proof = self.typed(family, GOOD)
                self.assertEqual(b"".join(map(proof.feed, chunks)), b"prompt> ")
                self.assertIs(proof.login, GOOD)

    def test_of_two_logins_in_one_packet_the_one_that_took_is_told(self):
        other = has.Credentials(b"connect", b"Bob", b"bobpw")
        for family in FAMILIES:
            for first, second, login in ((False, True, other), (False, False, None),
                                         # logged out in between
                                         (True, True, GOOD if family == "teenymush" else other)):
                shown = SHOWN[family][not first] + SHOWN[family][not second] + b"end"
                for chunks in splits(answer(family, first, 0) + answer(family, second, 1) + b"end"):
                    proof = self.typed(family, GOOD, other)
                    seen = b"".join(map(proof.feed, chunks))
                    self.assertEqual(seen, shown)
                    self.assertIs(proof.login, login, (family, first, second, chunks))

    def test_a_mark_printed_twice_is_removed_twice(self):
        proof = self.typed("tinymux", GOOD)
        self.assertEqual(proof.feed(b"a" + nonce() + b"\r\nb\r\n" + nonce() + b"\r\nc"), b"ab\r\nc")

    def test_a_foreign_nonce_proves_nothing_and_is_shown(self):
        for family in FAMILIES[1:]:
            proof, foreign = self.typed(family, GOOD), b"=99999999" + b"00=\r\n=0123abcd00\r\n=\r\n"
            self.assertEqual((proof.feed(foreign), proof.login), (foreign, None))

    def test_only_a_tail_that_could_begin_a_mark_is_held_back(self):
        for tail, shown in ((b"x=", b"x"), (b"x=0123ab", b"x"), (b"x=0123abcd00=", b"x"),
                            (b"x=0124", b"x=0124"), (b"x", b"x"), (b"x==", b"x="),
                            (b"x=0123abcd0g", b"x=0123abcd0g")):
            self.assertEqual(self.typed("tinymux", GOOD).feed(tail), shown)

    def test_rhost_with_hundreds_online_is_proven_too(self):
        for size in (100, 65536):
            proof = self.typed("rhostmush", GOOD)
            data = answer("rhostmush", True).replace(b"Alice", b"Alice  0  1 2   0 0  99\r\n" * 400)
            seen = b"".join(proof.feed(data[n:n + size]) for n in range(0, len(data), size))
            self.assertEqual((seen, proof.login), (SHOWN["rhostmush"][0], GOOD))

    def test_a_link_without_live_marks_need_not_be_read(self):
        for family in FAMILIES:
            self.assertFalse(has.proof_for(DIALECTS[family]).live)
            proof = self.typed(family, GOOD)
            self.assertTrue(proof.live)
            proof.retire()
            self.assertFalse(proof.live)
            self.assertTrue(has.proof_for(DIALECTS[family], returning=True).live)

    def test_outcomes_of_teenymush_come_in_order_at_the_start_of_a_line(self):
        other, fail = has.Credentials(b"co", b"Bob", b"b"), SHOWN["teenymush"][1]
        good = b"Last connect was from h on x\n"
        for data, login in ((fail + good, other), (good + fail, GOOD), (b"He says: " + good, None),
                            (b"That name is already in use.\r\n" + good, other),
                            (b"x\n" + good, GOOD)):
            for chunks in splits(data):
                proof = self.typed("teenymush", GOOD, other)
                self.assertEqual((b"".join(map(proof.feed, chunks)), proof.login), (data, login))
                self.assertFalse(proof.asked)       # nothing is asked of a link that is typed on

    def test_the_outcome_of_a_malformed_line_is_not_taken_for_that_of_the_next(self):
        self.assertIsNone(DIALECTS["teenymush"].read_login(b"connect a b c"))
        proof = self.typed("teenymush", GOOD)       # `connect a b c` went ahead in the same packet
        proof.feed(b"Invalid command, try: cOnnect <user> <password>\r\n" + SHOWN["teenymush"][0])
        self.assertIs(proof.login, GOOD)

    def test_the_bytes_that_bring_a_user_back(self):
        line = b"connect Alice alicepw\r\n"
        both = b"OUTPUTPREFIX Na\r\nOUTPUTSUFFIX Nz\r\n%s\r\nOUTPUTPREFIX\r\nOUTPUTSUFFIX\r\n"
        for family, before, behind in (
                ("teenymush", b"", b""), ("pennmush", b"", both % b" " + b"IDLE Ne\r\n"),
                ("tinymush", b"", b"OUTPUTSUFFIX N\r\nOUTPUTSUFFIX\r\nINFO\r\n"),
                ("tinymux", b"OUTPUTPREFIX N\r\n", b"OUTPUTPREFIX\r\nINFO\r\n"),
                ("rhostmush", b"", both % b"SESSION")):
            sent = has.proof_for(DIALECTS[family], True).script(GOOD).replace(nonce(), b"N")
            self.assertEqual(sent, before + line + behind)

    def test_a_return_is_held_until_the_end_marker_in_every_split(self):
        for family in FAMILIES:
            for right in (True, False):
                data = b"banner\r\n" + answer(family, right, 0, END[family])
                held = b"banner\r\n" + SHOWN[family][not right] + INFO * (END[family] == INFO)
                for chunks in splits(data):
                    proof = has.proof_for(DIALECTS[family], True)
                    proof.script(GOOD)
                    for chunk in chunks:
                        self.assertFalse(proof.ended, (family, chunks))
                        self.assertEqual(proof.feed(chunk), b"")
                    if family == "teenymush":
                        self.assertTrue(proof.asked)
                        self.assertEqual(proof.question(), b"\xff\xfd\x56")
                        self.assertFalse(proof.saw_command(b"\xff\xfc\x55"))
                        self.assertTrue(proof.saw_command(b"\xff\xfc\x56"))
                        self.assertFalse(proof.saw_command(b"\xff\xfc\x56"))     # the user's own
                    self.assertTrue(proof.ended, (family, chunks))
                    self.assertEqual((proof.held, proof.refused, proof.login),
                                     (held, not right, GOOD if right else None))
                    self.assertEqual(proof.feed(b"after\r\n"), b"after\r\n")

    def test_teenymush_is_not_asked_for_the_end_before_the_first_outcome(self):
        proof = has.proof_for(DIALECTS["teenymush"], True)
        proof.script(GOOD)
        self.assertEqual((proof.feed(b"banner\n"), proof.asked), (b"", False))
        self.assertFalse(proof.saw_command(b"\xff\xfc\x56"))

    def test_a_teenymush_without_telnet_ends_a_return_by_its_own_words(self):
        arrival = b"MAIL: You have 0 messages.\r\nThe Void\r\nAlice has connected.\r\n"
        for right, data in ((True, SHOWN["teenymush"][0] + arrival),
                            (False, b"banner\n" + SHOWN["teenymush"][1])):
            for chunks in splits(data):
                proof = has.proof_for(DIALECTS["teenymush"], True, telnet=False)
                proof.script(GOOD)
                for chunk in chunks:
                    self.assertFalse(proof.ended, chunks)
                    self.assertEqual(proof.feed(chunk), b"")
                self.assertEqual((proof.ended, proof.refused, proof.login),
                                 (True, not right, GOOD if right else None))
                # IAC DO would stick to a line
                self.assertEqual((proof.question(), proof.settles), (b"", False))
                self.assertEqual(proof.feed(b"after\r\n"), b"after\r\n")

    def test_lines_a_teenymush_may_not_know_as_logins_leave_others_to_choose_from(self):
        unknown, other = (has.Credentials(*it) for it in ((b"con", b"Alice", b"wrong"),
                                                          (b"connect", b"Bob", b"b")))
        proof = self.typed("teenymush", unknown, GOOD, other)
        proof.feed(SHOWN["teenymush"][0])
        self.assertEqual((proof.login, proof.others), (unknown, [GOOD, other]))

    def test_the_news_of_a_return_in_their_order(self):
        took, ask, ended = has.News
        for family, text, command, wanted in (
                ("tinymux", answer("tinymux", True, 0, END["tinymux"]), b"", [took, ended]),
                ("tinymux", answer("tinymux", False, 0, END["tinymux"]), b"", [ended]),
                ("teenymush", SHOWN["teenymush"][0], b"\xff\xfc\x56", [took, ask]),
                ("teenymush", SHOWN["teenymush"][1], b"\xff\xfc\x56", [ask])):
            proof = has.proof_for(DIALECTS[family], True)
            proof.script(GOOD)
            self.assertEqual(proof.hear(text + b"after"), (b"after" * (not command), wanted))
            self.assertEqual(proof.hear(b"")[1], [])                # told once
            self.assertEqual((proof.saw_command(command), proof.ended), (bool(command), True))

    def test_the_end_marker_can_be_asked_for_once_more(self):
        for family, asked in (("pennmush", b"IDLE =0123abcd01=e\r\n"), ("tinymux", b"INFO\r\n"),
                              ("teenymush", b"\xff\xfd\x56")):
            proof = has.proof_for(DIALECTS[family], True)
            proof.script(GOOD)
            proof.end()
            self.assertEqual((proof.settles, proof.ask_again(), proof.ended), (True, asked, False))
            self.assertEqual(proof.feed(b"Bob has connected.\r\n"), b"")
        self.assertFalse(has.proof_for(DIALECTS["tinymush"]).settles)      # INFO answers elsewhere

    def test_what_older_programs_packed_under_one_name(self):
        for family, kind in (("tinymux", has.MarkProof), ("teenymush", has.WordProof)):
            slots = has.pack(self.typed(family, GOOD))["slots"]
            proof = has.unpack({"object": "Proof", "slots": {**slots, "gone": 1}})
            self.assertIs(type(proof), kind)
            proof.feed(answer(family, True))
            self.assertEqual(proof.login, GOOD)

    def test_what_a_malformed_line_may_be_answered_is_nobodys(self):
        proof = self.typed("teenymush")
        proof.no_login(b"connect Alice")                            # answered like a whole login
        proof.no_login(b"connect a b c")                            # not answered, see above
        proof.wrap(GOOD, b"connect Alice alicepw\r\n", {})
        proof.feed(SHOWN["teenymush"][1])
        self.assertIsNone(proof.login)
        proof.feed(SHOWN["teenymush"][0])
        self.assertIs(proof.login, GOOD)

    def test_the_words_of_a_return_hold_no_answer_to_has(self):
        for family, words in (("tinymux", b"MOTD\r\nLimbo\r\n"), ("pennmush", b"MOTD\r\n")):
            proof = has.proof_for(DIALECTS[family], True)
            proof.script(GOOD)
            proof.feed(words + (INFO if family == "tinymux" else b""))
            self.assertEqual(proof.words(), words)

    def test_a_refusal_that_is_none(self):
        for family, text in (("pennmush", b"Player connections not allowed.\r\n"),
                             ("tinymush", b"banner\r\n"),
                             ("tinymux", b"Sorry, logins are temporarily disabled.\r\n")):
            proof = has.proof_for(DIALECTS[family], True)
            proof.script(GOOD)
            end = END[family]
            proof.feed(text + (end if end == INFO else end.replace(b"N", nonce())))
            self.assertEqual((proof.ended, proof.refused, proof.login), (True, False, None))


# ---- 5. Wire

class TestMailbox(unittest.TestCase):
    def setUp(self):
        self.box, self.ran = has.Mailbox(), []
        self.addCleanup(self.box.reader.close)
        self.addCleanup(self.box.writer.close)

    def wait(self):
        """Wait until the box wakes its owner."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.box.reader, selectors.EVENT_READ)
            self.assertTrue(selector.select(5), "nobody woke the owner")

    def test_calls_run_in_order_when_the_owner_runs_them(self):
        for n in range(5):
            self.box.post(self.ran.append, n)
        self.assertEqual(self.ran, [])
        self.wait()
        self.box.run()
        self.box.run()
        self.assertEqual(self.ran, [0, 1, 2, 3, 4])
        with self.assertRaises(BlockingIOError):                    # and the owner may sleep again
            self.box.reader.recv(1)

    def test_other_threads_may_post_and_each_keeps_its_order(self):
        threads = [
            threading.Thread(target=lambda name=name: [self.box.post(self.ran.append, (name, n))
                                                       for n in range(500)])
                   for name in "abc"]
        for thread in threads:
            thread.start()
        while len(self.ran) < 1500:
            self.wait()
            self.box.run()
        for thread in threads:
            thread.join()
        for name in "abc":
            self.assertEqual([n for who, n in self.ran if who == name], list(range(500)))

    @unittest.skipUnless(hasattr(signal, "SIGUSR1"), "no SIGUSR1 here")
    def test_a_signal_handler_may_post(self):
        old = signal.signal(signal.SIGUSR1, lambda number,
                            frame: self.box.post(self.ran.append, number))
        self.addCleanup(signal.signal, signal.SIGUSR1, old)
        os.kill(os.getpid(), signal.SIGUSR1)
        self.wait()
        self.box.run()
        self.assertEqual(self.ran, [signal.SIGUSR1])

    def test_what_a_call_posts_runs_next_time(self):
        def again():
            self.ran.append(len(self.ran))
            self.box.post(again)
        self.box.post(again)
        for n in range(1, 4):
            self.wait()
            self.box.run()
            self.assertEqual(len(self.ran), n)

    def test_a_full_socket_never_blocks_the_poster_and_loses_no_call(self):
        for n in range(20000):
            self.box.post(self.ran.append, n)
        self.wait()
        self.box.run()
        self.assertEqual(self.ran, list(range(20000)))
        with self.assertRaises(BlockingIOError):
            self.box.reader.recv(1)


class Selector(selectors.DefaultSelector):
    """Counts what it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def register(self, *arguments):
        self.told.append("register")
        return super().register(*arguments)

    def modify(self, *arguments):
        self.told.append("modify")
        return super().modify(*arguments)

    def unregister(self, *arguments):
        self.told.append("unregister")
        return super().unregister(*arguments)


class TestStream(unittest.TestCase):
    def setUp(self):
        self.selector, self.said, self.got = Selector(), [], b""
        self.addCleanup(self.selector.close)

    def on_data(self, data):
        self.got += data

    def on_stream_open(self, stream):
        self.said.append("open")

    def on_stream_end(self, stream, reason):
        self.said.append(("end", reason))

    def on_stream_full(self, stream):
        self.said.append("full")

    def on_stream_room(self, stream):
        self.said.append("room")

    def pair(self):
        """A stream and the other end of its socket."""
        mine, other = socket.socketpair()
        for sock in (mine, other):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            self.addCleanup(sock.close)
        other.settimeout(5)
        stream = has.Stream(self.selector, mine, self, self.on_data)
        self.addCleanup(stream.drop)
        return stream, other

    def turn(self, timeout=5):
        """One turn of a main loop; returns how much was ready."""
        ready = self.selector.select(timeout)
        for key, events in ready:
            key.data.ready(events)
        return len(ready)

    def drain(self, stream, other):
        """Read all that `stream` still has to send."""
        read, other = b"", other.dup()
        other.setblocking(False)
        while True:
            try:
                chunk = other.recv(65536)
            except BlockingIOError:
                if not stream.out:
                    break
                self.assertTrue(self.turn())
                continue
            if not chunk:
                break
            read += chunk
        other.close()
        return read

    def test_partial_sends_keep_the_order(self):
        stream, other = self.pair()
        parts = [b"%06d " % n * 500 for n in range(100)]
        for part in parts:
            stream.send(part)
        self.assertTrue(stream.out)
        self.assertEqual(self.drain(stream, other), b"".join(parts))
        self.assertEqual((stream.out, self.said[:1]), (b"", ["full"]))

    def test_the_watermarks_are_told_once(self):
        stream, other = self.pair()
        for _ in range(10):
            stream.send(b"x" * has.HIGH_WATER)
        self.assertEqual(self.said, ["full"])
        while len(stream.out) >= has.LOW_WATER:
            self.assertEqual(self.said, ["full"])
            other.recv(65536)
            self.turn(0)
        self.drain(stream, other)
        self.assertEqual((self.said, stream.full), (["full", "room"], False))

    def test_finish_flushes_then_ends_and_goes_on_reading(self):
        for size in (3, 100000):
            stream, other = self.pair()
            stream.send(b"x" * size)
            stream.finish()
            self.assertEqual(self.drain(stream, other), b"x" * size)
            self.assertEqual(other.recv(1), b"")
            other.sendall(b"late")
            self.turn()
            self.assertEqual((self.got, self.said.count(("end", ""))), (b"late", 0))
            other.close()
            self.turn()
            self.assertEqual(self.said.pop(), ("end", ""))
            self.got, self.said = b"", []
            stream.drop()

    def test_after_a_failed_send_the_last_words_come_and_then_the_end(self):
        stream, other = self.pair()
        other.sendall(b"last words")
        other.close()
        stream.send(b"x")
        stream.send(b"y")
        self.assertEqual((self.said, self.got, bool(stream.out)), ([], b"", False))
        while ("end", "") not in self.said:
            self.assertTrue(self.turn())
        self.assertEqual((self.said, self.got), ([("end", "")], b"last words"))
        # an end is told once and does not spin
        self.assertEqual(self.turn(0), 0)

    def test_a_send_that_fails_later_frees_what_was_held(self):
        stream, other = self.pair()
        stream.send(b"x" * (has.HIGH_WATER * 2))
        other.close()
        while self.turn(0):
            pass
        self.assertEqual((stream.out, self.said[:2]), (b"", ["full", "room"]))

    def test_last_words_are_delivered_before_a_drop(self):
        stream, other = self.pair()
        stream.pause()
        other.sendall(b"a" * 5000)
        other.close()
        stream.last_words()
        self.assertEqual((self.got, self.said), (b"a" * 5000, []))
        stream.drop()
        stream.last_words()
        self.assertEqual(self.got, b"a" * 5000)

    def test_the_selector_is_told_only_of_changes(self):
        stream, other = self.pair()
        self.assertEqual(self.selector.told, ["register"])
        for _ in range(5):
            stream.send(b"fits")
            stream.resume()
        self.assertEqual(self.selector.told, ["register"])
        for _ in range(5):
            stream.send(b"x" * 100000)
        self.drain(stream, other)
        # WRITE wanted, and no more
        self.assertEqual(self.selector.told, ["register", "modify", "modify"])
        for _ in range(3):
            stream.pause()
        self.assertEqual((self.selector.told[3:], self.turn(0)), (["unregister"], 0))
        other.sendall(b"waits")
        self.assertEqual((self.turn(0), self.got), (0, b""))
        stream.resume()
        self.turn()
        self.assertEqual((self.selector.told[3:], self.got), (["unregister", "register"], b"waits"))

    def test_a_drop_leaves_no_descriptor_registered(self):
        for prepare in (lambda s: None, lambda s: s.send(b"x" * 500000),
                        lambda s: s.pause(), lambda s: s.finish()):
            stream, _ = self.pair()
            prepare(stream)
            stream.drop()
            stream.drop()
            stream.send(b"x")
            stream.pause()
            stream.resume()
            stream.finish()
            self.assertEqual((dict(self.selector.get_map()), stream.sock.fileno()), ({}, -1))

    def listener(self):
        listener = closed_after(self, socket.socket())
        listener.bind(("127.0.0.1", 0))
        return listener

    def connect(self, listener):
        stream = has.Stream.connect(self.selector, (socket.AF_INET, listener.getsockname()),
                                    self, self.on_data)
        self.addCleanup(stream.drop)
        return stream

    def test_connect_opens_and_sends_what_was_said_before(self):
        listener = self.listener()
        listener.listen()
        stream = self.connect(listener)
        stream.send(b"early ")
        self.assertTrue(stream.connecting)
        self.turn()
        self.assertEqual((self.said, stream.connecting), (["open"], False))
        stream.send(b"late")
        other = closed_after(self, listener.accept()[0])
        self.assertEqual(self.drain(stream, other), b"early late")

    def test_finish_while_connecting_ends_the_writing_side_once_open(self):
        for on_open in (lambda: None, lambda: stream.send(b"hello")):
            listener = self.listener()
            listener.listen()
            stream = self.connect(listener)
            self.on_stream_open = lambda stream: on_open()
            stream.finish()
            self.turn()
            other = closed_after(self, listener.accept()[0])
            other.settimeout(1)
            # what is said later goes nowhere
            self.assertEqual(b"".join(iter(lambda: other.recv(99), b"")), b"")
            stream.drop()

    def test_a_refused_connect_ends_and_leaves_nothing_behind(self):
        stream = self.connect(self.listener())                      # bound, does not listen
        self.turn()
        self.assertEqual(self.said, [("end", "Connection refused")])
        stream.drop()
        self.assertEqual(dict(self.selector.get_map()), {})

    def test_a_connection_to_itself_is_found_and_reset(self):
        sock = self.listener()
        address = sock.getsockname()
        sock.setblocking(False)
        sock.connect_ex(address)
        stream = has.Stream(self.selector, sock, self, self.on_data, connecting=True)
        self.turn()
        if self.said == [("end", "Connection refused")]:
            self.skipTest("this kernel does not connect a port to itself")
        self.assertEqual(self.said, [("end", "connected to itself: nothing listens there")])
        self.assertEqual((stream.closed, sock.fileno(), dict(self.selector.get_map())),
                         (True, -1, {}))
        with socket.socket() as world:
            world.bind(address)                                     # free at once
            world.listen()
        stream.drop()


class TestProxyHeader(unittest.TestCase):
    """HAProxy's protocol, versions 1 and 2: whole, in pieces, broken."""

    @staticmethod
    def version_2(command=0x21, family=0x11,
                  addresses=bytes((198, 51, 100, 1, 127, 0, 0, 1, 1, 2, 3, 4)), more=b""):
        body = addresses + more
        return has.PROXY_2 + bytes((command, family)) + struct.pack(">H", len(body)) + body

    def headers(self):
        six = ipaddress.ip_address("2001:db8::7").packed + ipaddress.ip_address(
            "::1").packed + b"\1\2\3\4"
        mapped = ipaddress.ip_address("::ffff:198.51.100.1").packed + ipaddress.ip_address(
            "::1").packed + b"\1\2\3\4"
        return ((b"PROXY TCP4 198.51.100.1 127.0.0.1 1 2\r\n", "198.51.100.1"),
                (b"PROXY TCP6 2001:DB8:0::7 ::1 1 2\r\n", "2001:db8::7"),
                (b"PROXY TCP6 ::ffff:198.51.100.1 ::1 1 2\r\n", "198.51.100.1"),
                (b"PROXY TCP6 ::ffff:c633:6401 ::1 1 2\r\n", "198.51.100.1"),
                (b"PROXY UNKNOWN\r\n", None),
                (b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n", None),
                (self.version_2(), "198.51.100.1"),
                (self.version_2(family=0x21, addresses=six), "2001:db8::7"),
                (self.version_2(family=0x21, addresses=mapped), "198.51.100.1"),
                (self.version_2(more=b"\x04\0\3abc\x20\0\1x"), "198.51.100.1"),         # TLVs
                # LOCAL
                (self.version_2(command=0x20), None), (self.version_2(0x20, 0, b""), None),
                (self.version_2(family=0, addresses=b""), None),
                (self.version_2(family=0x31, addresses=b"/x".ljust(216, b"\0")), None))

    def test_whole_and_in_pieces(self):
        for head, host in self.headers():
            for stop in range(len(head)):
                self.assertIsNone(has.read_proxy_header(head[:stop]), head[:stop])
            for behind in (b"", b"connect Alice pw\r\n"):
                self.assertEqual(has.read_proxy_header(head + behind), (len(head), host))

    def test_no_header(self):
        for head in (b"connect Alice pw\r\n", b"\xff\xfb\x1f", b"\n", b"PROXX", b"\r\n\r\nx"):
            self.assertEqual(has.read_proxy_header(head), (0, None))

    def test_broken(self):
        for head in (b"PROXY TCP4 nobody x 1 2\r\n", b"PROXY TCP4 1.2.3 127.0.0.1 1 2\r\n",
                     b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n", b"PROXY TCP4 1.2.3.4 127.0.0.1 1 2\n",
                     b"PROXY " + b"x" * 200, self.version_2(command=0x11),
                     self.version_2(command=0x22), self.version_2(family=0x41),
                     self.version_2(family=0x13), self.version_2(addresses=b"\1\2\3\4")):
            with self.assertRaises(ValueError, msg=head):
                has.read_proxy_header(head)

    def test_addresses_are_values(self):
        for text, value in (("::ffff:198.51.100.1", "198.51.100.1"),
                            ("::FFFF:c633:6401", "198.51.100.1"),
                            ("2001:DB8:0:0::7", "2001:db8::7"), ("fe80::1%eth0", "fe80::1"),
                            ("127.0.0.1", "127.0.0.1")):
            self.assertEqual(str(has.address_of(text)), value)


class ChannelEnd:
    """An end of a Channel, and what has come there."""

    def __init__(self, case, sock):
        self.selector, self.said, self.ended = selectors.DefaultSelector(), [], False
        case.addCleanup(self.selector.close)
        self.channel = closed_after(case, has.Channel(self.selector, sock, self))

    def on_message(self, fds, message):
        for fd in fds:
            message.setdefault("read", []).append(os.read(fd, 99))
            os.close(fd)
        self.said.append(message)

    def on_channel_end(self):
        self.ended = True

    def turn(self):
        for key, events in self.selector.select(0):
            key.data.ready(events)


class TestChannel(unittest.TestCase):
    """Messages and descriptors between two processes."""

    def setUp(self):
        self.here, self.there = [ChannelEnd(self, sock) for sock in socket.socketpair()]

    @staticmethod
    def pipe(text):
        """A descriptor from which that can be read."""
        reader, writer = os.pipe()
        os.write(writer, text)
        os.close(writer)
        return reader

    def test_each_message_has_its_own_descriptors(self):
        before = open_descriptors()
        for number in range(200):
            fds = [self.pipe(b"%d.%d" % (number, n)) for n in range(number % 3)]
            self.here.channel.send({"number": number}, fds)
        done = []
        self.here.channel.send({"last": "\n"}, then=lambda: done.append(1))
        until = time.monotonic() + 10
        while not (done and len(self.there.said) == 201) and time.monotonic() < until:
            self.assertEqual(bool(done), not self.here.channel.waiting)
            self.there.turn()
            self.here.turn()
        self.assertEqual([it.get("read", []) for it in self.there.said[:-1]], [
            [b"%d.%d" % (number, n) for n in range(number % 3)] for number in range(200)])
        self.assertEqual([it.get("number") for it in self.there.said], [*range(200), None])
        self.assertEqual(open_descriptors(), before)

    def test_what_comes_in_pieces(self):
        raw = self.here.channel.sock
        for byte in b'{"fds": 0, "a": 1}\n{"fds": 0, "b":':
            raw.send(bytes([byte]))
            self.there.turn()
        self.assertEqual(self.there.said, [{"a": 1}])
        raw.send(b" 2}\n")
        self.there.turn()
        self.assertEqual(self.there.said[1:], [{"b": 2}])

    def test_the_end(self):
        self.here.channel.send({"last": 1}, [self.pipe(b"x")])
        self.here.channel.close()
        self.there.turn()
        self.there.turn()
        self.assertEqual((self.there.said, self.there.ended), ([{"last": 1, "read": [b"x"]}], True))
        before = open_descriptors()
        self.there.channel.send({"nobody": "reads"}, [self.pipe(b"y")])
        self.assertLess(open_descriptors(), before + 1)

    def test_what_is_sent_to_nobody_is_closed(self):
        before = open_descriptors()
        self.here.channel.sock.shutdown(socket.SHUT_RDWR)
        done = []
        self.there.channel.send({"a": 1}, [self.pipe(b"y")], lambda: done.append(1))
        self.assertEqual((open_descriptors(), done), (before, [1]))

    def test_no_descriptors_where_there_is_no_room(self):
        """Too many in flight, at the one who sends; too many open, at the other one."""
        fails, send = [OSError(errno.ETOOMANYREFS, "")], socket.socket.sendmsg

        def sendmsg(sock, *arguments):
            if arguments[1] and fails:
                raise fails.pop()
            return send(sock, *arguments)
        with mock.patch.object(socket.socket, "sendmsg", sendmsg):
            for number in range(2):
                self.here.channel.send({"n": number}, [self.pipe(b"x")])
        receive = socket.socket.recvmsg
        self.there.turn()
        self.there.turn()
        self.here.channel.send({"n": 2}, [self.pipe(b"x")])
        self.here.channel.send({"n": 3}, [self.pipe(b"y")])
        with mock.patch.object(socket.socket, "recvmsg", lambda sock, size, room, flags: (
                receive(sock, size)[0], [], socket.MSG_CTRUNC, None)):
            self.there.turn()
        self.there.turn()
        self.assertEqual(self.there.said, [{"n": 0}, {"n": 1, "read": [b"x"]}, {"n": 2},
                                           {"n": 3, "read": [b"y"]}])


# ======================================================================
# Parts 6 and 8: sessions and the hub
#
# The state table, every order of events, timers and limits: a Hub turned by hand with a clock of
# ours.
# ======================================================================

# ---- helpers: all that knows the inside of has.py is here

class Clock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


class Beat:
    """Stands for the heartbeat: what the hub posts is recorded; the test answers, or does not."""

    def __init__(self):
        self.mailbox, self.asks, self.checks, self.settings = self, [], [], []

    def post(self, call, *arguments):
        call(*arguments)

    def on_ask(self, number, serial):
        self.asks.append((number, serial))

    def on_check(self, number, serial, pairs):
        self.checks.append((number, serial, pairs))

    def on_settings(self, settings):
        self.settings.append(settings)

    def on_down(self):
        pass

    def on_stop(self):
        pass


NOTICES = {name + "_notice": "# " + name.upper()
           for name in ("offline", "online", "moved", "silent", "unsent")}
PLAIN_SETTINGS = dict(
    NOTICES, **RARE_NOTICES, relogin_failed_notice="# REFUSED", suspect_notice="# SUSPECT",
    mush_address="127.0.0.1:4001", mush_type="auto",
    local_address="127.0.0.1", local_port=0, proxy_from="", hb_user="heartbeat",
    hb_pass="heartbeat", beat=10, retry=1,
    hb_timeout=10, dead_after=60, failover_after=60, failback_after=0,
    remotehostname_cmd="auto", add_epoch_time="yes",
    resume_rate="auto", login_hold=0, hold=0, max_clients=0, max_per_host=0,
    output_limit=1048576, log_file="",
    log_level="info", mush_ssl="no", mush_ssl_verify="yes", mush_ssl_ca="",
    local_port_ssl=0, ssl_cert="", ssl_key="",
    admins="", control_socket="", on_event="", still_offline_every=300,
    deny="", reattach_notice="# NOTICE # Welcome back: your place was kept for {time}.")


@functools.lru_cache(None)
def settings_of(changes):
    """Settings with every key given, so that edited constants change nothing here."""
    with tempfile.TemporaryDirectory() as folder:
        conf = os.path.join(folder, "has.conf")
        with open(conf, "w") as file:
            file.writelines(f"{key} = {value}\n" for key,
                            value in dict(PLAIN_SETTINGS, **dict(changes)).items())
        return has.load_settings(has.__file__, conf)[0]


class Peer:
    """Our end of a connection: a client's, or the world's end of a link."""

    def __init__(self, sock, settle=None):
        self.sock, self.ended, self.session, self._settle = sock, False, None, settle
        sock.setblocking(False)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data):
        self.sock.sendall(data.encode() if isinstance(data, str) else data)

    def says(self, data):
        """Send it, and wait until HAS has dealt with it."""
        self.send(data)
        self._settle()

    def hangs_up(self):
        """Close our end, and wait until HAS has dealt with it."""
        self.sock.close()
        self._settle()

    def read(self):
        """All that has come since the last read."""
        data = b""
        while not self.ended:
            try:
                chunk = self.sock.recv(1 << 20)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            self.ended, data = not chunk, data + chunk
        return data

    def lines(self):
        """The same as a list of lines, without colour resets and empty lines."""
        return [line for line in self.read().replace(b"\x1b[0m",
                                                     b"").decode("latin-1").split("\r\n") if line]

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class TLSPeer(Peer):
    """The same in TLS; read() also does what its handshake needs."""

    def __init__(self, sock, settle=None, is_server=False):
        super().__init__(sock, settle)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        if is_server:
            context.load_cert_chain(*certificate_of_all())
        else:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._came, self._goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._came, self._goes, server_side=is_server)
        self.is_open = self.was_notified = False
        self._late = self.kept = b""            # to be sent, to be read
        self.count = 0             # bytes that have come

    def _flush(self):
        with contextlib.suppress(OSError):
            self.sock.sendall(self._goes.read())

    def send(self, data):
        data = data.encode() if isinstance(data, str) else data
        if self.is_open and data:              # Python 3.8 and 3.9 take writing nothing for an end
            self.tls.write(data)
            self.sock.sendall(self._goes.read())
        else:
            self._late += data

    def notify(self):
        """Send close_notify."""
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        self._flush()

    def read(self):
        return self.decrypted(super().read())

    def decrypted(self, data):
        """The text in it; the handshake goes on, if there is something of that in it."""
        self.count += self._came.write(data)
        text, self.kept = self.kept, b""
        try:
            if not self.is_open:
                self.tls.do_handshake()
                self.is_open = True
                self.send(self._late)
            while True:
                data = self.tls.read(1 << 16)
                if not data:
                    raise ssl.SSLZeroReturnError
                text += data
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.was_notified = True
        self._flush()
        return text


@functools.lru_cache(None)
def certificate_of_all():
    """One that all tests may use: its file and its key's."""
    folder = tempfile.mkdtemp(prefix="has-tls-")
    atexit.register(shutil.rmtree, folder, True)
    return certificate(folder)


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname()), server.accept()[0]


class Game:
    """The world: a listening socket. `full` never completes a connect."""

    def __init__(self, settle, full=False, path=None, secure=False):
        self.secure = secure
        self.sock, self.peers = socket.socket(socket.AF_UNIX if path else socket.AF_INET), []
        self._settle = settle
        self.sock.bind(path or ("127.0.0.1", 0))
        self.sock.listen(0 if full else 64)
        self.sock.settimeout(5)
        self.target = self.sock.family, self.sock.getsockname()
        for _ in range(3 if full else 0):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(self.sock.getsockname())
            self.peers.append(Peer(sock))

    def accept(self):
        sock = self.sock.accept()[0]
        self.peers.append(TLSPeer(sock, self._settle, True) if self.secure else
                          Peer(sock, self._settle))
        return self.peers[-1]

    def close(self):
        for peer in self.peers + [self]:
            peer.sock.close()


SUSPECT_SECONDS = has.Suspects.WINDOW
HOME, AWAY = has.Address("127.0.0.1", 4001, None), has.Address("127.0.0.1", 4002, None)


class Rig:
    """A hub, its clock, its stub heartbeat, a world, and what they need to be watched."""

    def __init__(self, family="tinymux", up=True, suspicious=False, **settings):
        # the clock stands still in most tests, so that every death would come just behind a return
        has.Suspects.WINDOW = SUSPECT_SECONDS if suspicious else -1
        has.log.handlers[:], has.log.propagate = [logging.NullHandler()], False
        self.clock, self.events, self.peers, self.fronts = Clock(), 0, [], []
        self.program = 1           # see Fronts
        self.settings = settings_of(tuple(sorted(settings.items())))
        self.beat, self.family = Beat(), has.DIALECTS[family]
        self.hub = self._new_hub()
        self.game, self.other, self.full = (Game(self.settle), Game(self.settle),
                                            Game(self.settle, full=True))
        if up:
            self.found("life 1")

    def _new_hub(self):
        hub = has.Hub(self.settings, lambda: (self.settings, []), self.clock)
        hub.heartbeat = self.beat
        hub.fronts.launch, hub.fronts.program = self._launch, self.program
        self._count(hub)
        return hub

    def _count(self, loop):
        """Note what happens in it."""
        select = loop.selector.select

        def counting(timeout):
            ready = select(timeout)
            self.events += len(ready)
            return ready
        loop.selector.select = counting

    def _launch(self, fd):
        """The process that speaks TLS is a loop in this one."""
        self.fronts.append(has.TLSFront(socket.socket(fileno=os.dup(fd)), self.clock))
        self._count(self.fronts[-1])
        return 1 << 30

    def end_front(self, front):
        """It ends; or is killed: the kernel closes all it has."""
        self.fronts.remove(front)
        for sock in [key.fileobj for key in front.selector.get_map().values()] + [
                stream.sock for tunnel in front.tunnels.values()
                for stream in (tunnel.line, tunnel.plain) if stream]:
            sock.close()
        front.mailbox.writer.close()
        front.selector.close()

    def upgrade(self, spoil=None, whole=True, anew=False):
        """USR2 without the exec: another hub takes over what this one packed (and `spoil` has
        spoilt); `anew`: with settings and a log made of that, as resume() does."""
        old, fds = self.hub, []

        def name(sock):
            fds.append(sock.fileno())
            return fds[-1]
        state = json.loads(json.dumps(has.Survival(old).pack(name)))
        if spoil:
            spoil(state)
        socks = [it.sock for session in old.sessions.values()
                 for it in (session.client, session.link)
                 if it and it.sock]
        self._close_wires(old)
        socks += [it.channel.sock for it in old.fronts.all]
        for sock in socks + [it.sock for it in old.door.listeners]:
            (sock.detach if sock.fileno() in fds else sock.close)()
        for sock in (old.selector, old.mailbox.reader, old.mailbox.writer):
            sock.close()
        if anew:
            self.settings = has.settings_of(state["settings"], has.unpack(state["files"]),
                                            state["conf"])
            has.restart_log(self.settings)
        self.hub = self._new_hub()
        survival = has.Survival(self.hub)
        survival.unpack(state, lambda fd: socket.socket(fileno=fd), whole)
        if anew:
            has.warn_of_differences(self.settings,
                                    lambda: has.load_settings(has.__file__, state["conf"]))
        survival.go_on({"connection": None})
        for peer in self.peers:
            peer.session = self.hub.sessions.get(peer.session.number, peer.session)
        self.settle()

    @staticmethod
    def _close_wires(hub):
        for front in hub.fronts.all:
            for far in front.fars.values():
                far.leave()

    def keep(self):
        """From now on all is written down for another process, as where there is a keeper."""
        self.vault = has.Vault.make()
        self._watch_over(None)
        return self

    def _watch_over(self, parked):
        self.survival = has.Survival(self.hub, self.vault)
        self.hub.scribe = has.Scribe(self.survival)
        self.hub.scribe.begin(parked)

    def die(self):
        """kill -9: another hub goes on from what was written down."""
        for sock in [key.fileobj for key in self.hub.selector.get_map().values()]:
            sock.close()                        # as the kernel does: no shutdown
        for session in self.hub.sessions.values():
            for stream in (session.client, session.link):
                if stream and stream.sock:
                    stream.sock.close()         # one that was not read just now
        self._close_wires(self.hub)
        self.hub.mailbox.writer.close()
        self.hub.selector.close()
        before, self.vault = self.vault, has.Vault([os.dup(fd) for fd in self.vault.fds])
        before.close()
        self.hub = self._new_hub()
        survival, state = has.Survival(self.hub, self.vault), self.vault.load()
        survival.unpack(state, self.vault.take, whole=False)
        self.vault.keep(b"")
        self._watch_over(state["heartbeat"])
        survival.go_on({"connection": None})
        for peer in self.peers:
            number = peer.session and peer.session.number
            peer.session = self.hub.sessions.get(number, peer.session)
        self.settle()

    def settle(self, until=None):
        """Turn until nothing happens any more, and `until()` is true; fail after 20 s."""
        deadline, quiet = time.monotonic() + 20, 0
        while quiet < 2 or until and not until():
            if time.monotonic() > deadline:
                raise AssertionError("it does not settle")
            before = self.events
            self.hub.turn(0.01 if quiet >= 2 else 0)
            for front in list(self.fronts):
                front.turn(0)
                if front.is_done:
                    self.end_front(front)
            due = any(loop._timers and loop._timers[0][0] <= self.clock()
                      for loop in [self.hub, *self.fronts])
            quiet = quiet + 1 if self.events == before and not self.hub.backlogs and not due else 0

    def pass_time(self, *seconds):
        for step in seconds:
            self.clock.advance(step)
            self.settle()

    def post(self, call, *arguments):
        """What the heartbeat does."""
        self.hub.mailbox.post(call, *arguments)
        self.settle()

    def heard(self, event, *arguments):
        """What the heartbeat has heard of the world."""
        self.post(self.hub.heard, event, *arguments)

    def status(self):
        """What --status is told."""
        told = []
        self.hub.control.command({"do": "status"}, told.append)
        return json.loads(told[0])

    def found(self, life, game=None, address=HOME, checks=False, shut=False, tls=None):
        self.life = life
        world = has.World(address, (game or self.game).target, self.family,
                          life, shut, checks, shut=shut, tls=tls)
        self.post(self.hub.on_world_found, world)

    def down(self):
        self.heard("lost", "no answer", True)

    def restart(self, life, *where, **how):
        """The world dies and is found again, in this life."""
        self.down()
        self.found(life, *where, **how)

    def answer(self, asks=None, life=None):
        """A probe sent just now is answered."""
        asks, self.beat.asks = self.beat.asks if asks is None else asks, []
        self.post(self.hub.on_answers, asks, life or self.life, 0.1)

    def client(self, host="203.0.113.9", tcp=False, tls=False):
        """A user connects."""
        ours, theirs = tcp_pair() if tcp or tls else socket.socketpair()
        kind, known = TLSPeer if tls else Peer, set(self.hub.sessions)
        peer = kind(ours, self.settle)
        self.peers.append(peer)
        if tls:
            self.hub.door.on_accept(theirs, host, True)
            self.shake_hands(peer)
        else:
            self.hub.door.on_client(has.Stream(self.hub.selector, theirs, None, None), host, False)
        peer.session = next((s for n, s in self.hub.sessions.items() if n not in known), None)
        self.settle()
        return peer

    def shake_hands(self, peer):
        """Until TLS has been agreed on."""
        def is_agreed():
            peer.kept = peer.read()
            return peer.is_open or peer.ended
        self.settle(is_agreed)
        self.settle()

    def newcomer(self, **how):
        """A user at the login screen: (client, world's end of the link)."""
        client, link = self.client(**how), self.game.accept()
        if self.game.secure:
            self.shake_hands(link)
        return client, link

    def player(self, name="Alice", **how):
        """A user in the game: (client, world's end of the link)."""
        client, link = self.newcomer(**how)
        client.send(f"connect {name} pw\r\n")
        self.settle()
        self.let_in(link)
        assert client.session.state.name == "PLAYING", client.session.state
        client.read()
        return client, link

    def let_in(self, link, text="Welcome"):
        """The world (a TinyMUX) takes the login on this link; `text` None: refuses it."""
        asked = link.read()
        mark = re.search(rb"OUTPUTPREFIX (=\w+=)\r\n", asked).group(1) + b"\r\n" if text else b""
        info = b""
        if b"INFO\r\n" in asked:
            info = b"### Begin INFO\r\nVersion: MUX\r\n### End INFO\r\n"
        words = text or "Either that player does not exist, or has a different password."
        link.send(words.encode() + b"\r\n" + mark + info)
        self.settle()

    def returning(self, **how):
        """A user whose return has begun: (client, world's end of the new link)."""
        client, _ = self.player(**how)
        self.down()
        self.found("life 2")
        client.read()
        return client, self.game.accept()

    def close(self):
        for session in list(self.hub.sessions.values()):
            session.end()
        for listener in self.hub.door.listeners:
            listener.close()
        for front in self.hub.fronts.all:
            front.channel.close()
        for front in list(self.fronts):
            self.end_front(front)
        self._close_wires(self.hub)
        self.hub.selector.close()
        if self.hub.scribe:
            self.vault.close()
        for thing in [self.hub.mailbox.reader, self.hub.mailbox.writer, self.game, self.other,
                      self.full] + [peer.sock for peer in self.peers]:
            thing.close()


def nonce_of(rig, client):
    """The mark (of a TinyMUX) that the login being tried would bring."""
    proof = client.session.feed.proof
    return proof._secret + b"%02x=" % (proof._count - 1)


def is_gone(client):
    return client.session.number not in client.session.hub.sessions


def state_of(client):
    return "gone" if is_gone(client) else client.session.state.name


def check_consistent(case, rig):
    """The selector knows open descriptors of living sessions only, each under its right number."""
    streams = [s for x in rig.hub.sessions.values() for s in (x.client, x.link) if s]
    streams += [it.channel for it in rig.hub.fronts.all]
    case.assertFalse([s for s in streams if s.closed], "a session keeps a closed stream")
    known = [rig.hub.mailbox.reader] + [s.sock
                                        for s in streams] + [x.sock for x in rig.hub.door.listeners]
    for fd, key in rig.hub.selector.get_map().items():
        case.assertIn(key.fileobj, known)
        case.assertEqual(fd, key.fileobj.fileno())


def open_descriptors():
    return len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0


class RigCase(unittest.TestCase):
    def rig(self, *arguments, **settings):
        return closed_after(self, Rig(*arguments, **settings))

    def newcomer(self, **more):
        """Of a new rig: (that, client, world's end of the link), and so for the next two."""
        rig, how = self._rig_and_client(more)
        return (rig, *rig.newcomer(**how))

    def player(self, *name, **more):
        rig, how = self._rig_and_client(more)
        return (rig, *rig.player(*name, **how))

    def returning(self, **more):
        rig, how = self._rig_and_client(more)
        return (rig, *rig.returning(**how))

    def _rig_and_client(self, more):
        how = {key: more.pop(key) for key in ("host", "tcp", "tls") if key in more}
        return self.rig(**more), how


# ---- 1. the state table

COLUMNS = tuple(state.name for state in has.State)
SAME, ONLY = "the same", "-"
REST = "OPENING ASKING WAITING BACKOFF REOPENING CLOSING"
# event: {states: (new state, the link: SAME, none, new or shut, what the client is sent, what the
# world is sent)};
# ONLY: it cannot happen there, for there is no open link
TABLE = {
    "client text": {
        "OPENING ASKING RETURNING REOPENING CLOSING": (SAME, SAME, []),
        "LOGIN PLAYING": (SAME, SAME, [], ["hello"]),
        "WAITING BACKOFF": (SAME, SAME, ["# UNSENT hello"])},
    "client EOF": {
        "LOGIN PLAYING": ("CLOSING", "shut", []),
        "OPENING ASKING WAITING BACKOFF RETURNING REOPENING CLOSING": ("gone", "none", [])},
    "client reset": {" ".join(COLUMNS): ("gone", "none", [])},
    "world text": {"LOGIN PLAYING": (SAME, SAME, ["text"]), "RETURNING": (SAME, SAME, []),
                   REST: ONLY},
    "link closes": {
        "LOGIN PLAYING": ("ASKING", "none", ["last words"]), "RETURNING": ("BACKOFF", "none", []),
        REST: ONLY},
    "ten seconds": {
        "LOGIN PLAYING ASKING WAITING": (SAME, SAME, []), "OPENING": (SAME, "none", ["# OFFLINE"]),
        "REOPENING": ("BACKOFF", "none", []), "BACKOFF": ("RETURNING", "new", []),
        "RETURNING": ("LOGIN", SAME, ["# ONLINE"]), "CLOSING": ("gone", "none", [])},
    "verdict: left": {
        "ASKING": ("CLOSING", "none", []),
        "OPENING LOGIN PLAYING WAITING BACKOFF RETURNING REOPENING CLOSING": (SAME, SAME, [])},
    "verdict: other life": {
        "ASKING": ("RETURNING", "new", ["# OFFLINE"]),
        "OPENING LOGIN PLAYING WAITING BACKOFF RETURNING REOPENING CLOSING": (SAME, SAME, [])},
    "silent": {"PLAYING WAITING BACKOFF RETURNING REOPENING CLOSING": (SAME, SAME, []),
               # at LOGIN: nobody has greeted him yet
               "OPENING LOGIN ASKING": (SAME, SAME, ["# SILENT"])},
    "silent, two lines": {
        "OPENING ASKING": (SAME, SAME, ["# SILENT"]),
        "LOGIN PLAYING": (SAME, SAME, ["# SILENT"], ["one", "two"]),
        "WAITING BACKOFF": (SAME, SAME, ["# UNSENT one", "# UNSENT two"]),
        "RETURNING REOPENING CLOSING": (SAME, SAME, [])},
    "world down": {
        "OPENING LOGIN PLAYING ASKING": ("WAITING", "none", ["# OFFLINE"]),
        "WAITING CLOSING": (SAME, "none", []),
        "BACKOFF RETURNING REOPENING": ("WAITING", "none", [])},
    "world up": {
        "OPENING LOGIN PLAYING ASKING RETURNING REOPENING CLOSING": (SAME, SAME, []),
        "WAITING BACKOFF": ("RETURNING", "new", [])},
    "world reborn": {
        "OPENING LOGIN": ("LOGIN", "new", ["# OFFLINE", "# ONLINE"]),
        "PLAYING ASKING": ("RETURNING", "new", ["# OFFLINE"]),
        "WAITING BACKOFF RETURNING REOPENING": ("RETURNING", "new", []),
        "CLOSING": (SAME, SAME, [])},
    "address moved": {
        "OPENING LOGIN": ("LOGIN", "new", ["# MOVED", "# ONLINE"]),
        "PLAYING ASKING": ("RETURNING", "new", ["# MOVED"]),
        "WAITING BACKOFF RETURNING REOPENING": ("RETURNING", "new", []),
        "CLOSING": (SAME, SAME, [])},
    "HUP": {" ".join(COLUMNS): (SAME, SAME, [])},
}


def bring_to(rig, column):
    """A client in that state, and the world's end of its link."""
    if column in ("OPENING", "LOGIN"):
        if column == "OPENING":
            rig.found("life 1", rig.full)
        client = rig.client(tcp=True)
        return client, rig.game.accept() if column == "LOGIN" else None
    client, link = rig.player(tcp=True)
    rig.pass_time(10)                           # what he typed was answered
    if column == "CLOSING":
        client.send("QUIT\r\n")
        rig.settle(lambda: b"QUIT" in link.read())
    if column in ("ASKING", "CLOSING"):
        link.sock.close()
        rig.settle(lambda: state_of(client) == column)
    elif column != "PLAYING":
        rig.down()
        if column != "WAITING":
            rig.found("life 2", rig.full if column == "REOPENING" else rig.game)
        link = rig.game.accept() if column in ("RETURNING", "BACKOFF") else None
        if column == "BACKOFF":
            link.sock.close()
            rig.settle(lambda: state_of(client) == "BACKOFF")
    return client, link if column in ("PLAYING", "RETURNING") else None


def cause(rig, event, client, link):
    """Make the event happen."""
    number, serial, life = client.session.number, client.session.serial, rig.hub.world.life
    if event == "link closes":
        link.send("last words\r\n")
        link.sock.close()
    elif event == "silent, two lines":
        rig.heard("silent")
        client.says("one\r\n")
        client.send("two\r\n")
    else:
        {"client text": lambda: client.send("hello\r\n"),
         "client EOF": lambda: client.sock.shutdown(socket.SHUT_WR), "client reset": client.reset,
         "world text": lambda: link.send("text\r\n"),
         "ten seconds": lambda: rig.clock.advance(10.1), "silent": lambda: rig.heard("silent"),
         "verdict: left": lambda: rig.answer([(number, serial)], client.session.life),
         "verdict: other life": lambda: rig.answer([(number, serial)], "life 9"),
         "world down": rig.down, "world up": lambda: rig.found(life),
         "world reborn": lambda: rig.found("life 9"), "HUP": rig.hub.reload.run,
         "address moved": lambda: rig.found("life 9", rig.other, AWAY)}[event]()


class StateTable(unittest.TestCase):
    def test_every_cell(self):
        cells = {(event, column): cell for event, row in TABLE.items()
                 for columns, cell in row.items() for column in columns.split()}
        self.assertEqual(set(cells), set(itertools.product(TABLE, COLUMNS)), "a cell is missing")
        # imports and caches open their files
        self.check("client text", "LOGIN", cells["client text", "LOGIN"])
        for (event, column), cell in cells.items():
            with self.subTest(event=event,
                              state=column), mock.patch.object(has.log, "error") as error:
                before = open_descriptors()
                self.check(event, column, cell)
                self.assertEqual(open_descriptors(), before, "descriptors leaked")
                error.assert_not_called()       # no event without a row (see has.Session.handle)

    def test_the_rows_of_the_table(self):
        """What no session can be spared has a row in every state; an event without one is logged,
        and ends nothing."""
        rows = {event: {state for state, known in has.Session.TABLE if known is event}
                for event in has.Event}
        for event in (has.Event.DOWN, has.Event.RETRY, has.Event.OVERDUE,
                      has.Event.CLIENT_ENDED, has.Event.CLIENT_LOST):
            self.assertEqual(rows[event], set(has.State), event)
        self.assertTrue(all(rows.values()), "an event that nobody takes")
        closes = {name for names, cell in TABLE["link closes"].items()
                  if cell is not ONLY for name in names.split()}
        self.assertEqual({state.name for state in rows[has.Event.ENDED]}, closes | {"CLOSING"})
        rig = closed_after(self, Rig())
        client = rig.client()
        with self.assertLogs("has", "ERROR") as logged:
            client.session.handle(has.Event.LEFT)
        self.assertIn("a fault of HAS: verdict: the user left while at the login screen: ignored",
                      logged.output[0])
        self.assertEqual(state_of(client), "LOGIN")

    def check(self, event, column, cell):
        rig = Rig()
        try:
            client, link = bring_to(rig, column)
            rig.settle()
            client.read(), link and link.read()
            old, state = client.session.link, state_of(client)
            if cell is ONLY:
                self.assertTrue(old is None or old.connecting)
                return
            cause(rig, event, client, link)
            wanted = state if cell[0] is SAME else cell[0]
            rig.settle()
            self.assertEqual(state_of(client), wanted)
            if event != "client reset":
                self.assertEqual(client.lines(), cell[2])
                self.assertEqual(client.ended, wanted in ("gone", "CLOSING") and cell[1] != "shut")
            self.check_link(cell[1], client.session, old, link)
            self.assertEqual(link.lines() if link and len(cell) > 3 else [],
                             cell[3] if len(cell) > 3 else [])
            check_consistent(self, rig)
        finally:
            rig.close()

    def check_link(self, wanted, session, old, link):
        if wanted == "none":
            self.assertIsNone(session.link)
        elif wanted == "new":
            self.assertTrue(session.link and session.link is not old)
        else:
            self.assertIs(session.link, old)
        if old and wanted in ("none", "new"):
            self.assertTrue(old.closed)
        if wanted == "shut":
            link.read()
            self.assertTrue(link.ended)


# ---- 2. every order

class EveryOrder(unittest.TestCase):
    """Rule 2, asked about each order in which things can be learnt; the oracle below is the rule in
    a few lines."""

    def walk(self, rig, client, order, oracle, cause):
        """Cause each event in turn and compare with what the oracle says of the events so far."""
        old_link = client.session.link
        for count, event in enumerate(order, 1):
            cause(event)
            rig.settle()
            wanted = oracle(order[:count])
            self.assertEqual("CLOSING" if state_of(client) == "gone" else state_of(client),
                             wanted, order[:count])
            if wanted == "PLAYING":
                self.assertIs(client.session.link, old_link,
                              "a user of a living world was disturbed")
        return client.lines()

    def start(self, has_quit):
        rig = Rig()
        client, link = rig.player()
        if has_quit:
            client.send("QUIT\r\n")
            rig.settle(lambda: b"QUIT" in link.read())
        return rig, client, link

    # {the link closes, the heartbeat's connection closes, a probe is answered on it, the heartbeat
    # is back, 3 s, HUP}

    EVENTS = ("link", "heartbeat", "answer", "back", "3 s", "HUP")

    @staticmethod
    def verdict(order, life, refused, has_quit):
        """What must have become of the user after these events."""
        user, heartbeat, late = "PLAYING", "old", False
        # the world is gone; one who typed QUIT is not kept
        held = "CLOSING" if has_quit else "WAITING"
        for event in order:
            if event == "link" and user == "PLAYING":
                user = "CLOSING" if has_quit else "ASKING"
            elif event == "answer" and user == "ASKING":
                # asked after the close, on a connection older than it
                user = "CLOSING"
            elif event == "heartbeat":
                heartbeat = "away"
            elif event == "3 s" and heartbeat == "away":
                late = True                                     # it could not get back in time
            elif event == "back":
                heartbeat = life
                if life == "new" and user in ("PLAYING", "ASKING"):
                    user = held                                 # the world he was in is no more
            # refused for so long, or every link has ended, too: else nothing is known of the world
            # (HAS's own trouble)
            down = late and (refused or user == "ASKING") or refused and user == "ASKING"
            if heartbeat == "away" and down and user in ("PLAYING", "ASKING"):
                user = held
            if heartbeat in ("same", "new", "unknown"):
                # the next probe: only the same life proves anything
                if user == "ASKING":
                    user = "CLOSING" if heartbeat == "same" else "WAITING"
                user = "RETURNING" if user == "WAITING" else user
        return user

    def one_order(self, order, life, refused, has_quit):
        rig, client, link = self.start(has_quit)
        is_back = False

        def cause(event):
            nonlocal is_back
            if event == "link":
                link.sock.close()
            elif event == "heartbeat":
                rig.heard("lost", "closed by the world", False)
            elif event == "answer":
                rig.answer()
            elif event == "3 s":
                rig.clock.advance(3.1)
            elif event == "HUP":
                rig.hub.reload.run()
            else:
                is_back = True
                rig.found({"same": "life 1", "new": "life 2", "unknown": "?2"}[life])
            rig.settle()
            if refused and "heartbeat" == event:
                rig.heard("unreachable", HOME, "refused", False)
            elif refused and not is_back and rig.hub.health.loss:
                rig.heard("unreachable", HOME, "refused", False)
            if is_back and rig.beat.asks:
                rig.answer()
        try:
            sent = self.walk(rig, client, order,
                             lambda events: self.verdict(events, life, refused, has_quit), cause)
            self.assertLessEqual(sent.count("# OFFLINE"), 1)
            self.assertEqual("# OFFLINE" in sent, state_of(client) == "RETURNING")
            check_consistent(self, rig)
        finally:
            rig.close()

    def test_loss_and_return(self):
        count = 0
        for order in itertools.permutations(self.EVENTS):
            if not order.index("answer") < order.index("heartbeat") < order.index("back"):
                # cannot be: a closed connection answers nothing
                continue
            for case in itertools.product(("same", "new", "unknown"), (False, True), (False, True)):
                count += 1
                with self.subTest(order=order, life=case[0], refused=case[1], has_quit=case[2]):
                    self.one_order(order, *case)
        self.assertEqual(count, 1440)

    # {silent, answers again, silent for dead_after, fail-over, the link closes}

    @staticmethod
    def can_be(order):
        """Only a silent world can answer again or be given up; one given up is not silent any
        more."""
        silent = down = False
        for event in order:
            if event in ("answers", "dead") and not silent or event == "silent" and down:
                return False
            silent = event == "silent" or silent and event == "link"
            down = event == "dead" or down and event != "fail-over"
        return True

    @staticmethod
    def fate(order, has_quit):
        """What must have become of the user: as in verdict(), with silence and another world."""
        user, healthy = "PLAYING", True
        held = "CLOSING" if has_quit else "WAITING"
        for event in order:
            healthy = event in ("answers", "fail-over") or healthy and event == "link"
            if event == "link" and user == "PLAYING":
                user = "CLOSING" if has_quit else "ASKING"
            elif event == "silent" and user == "PLAYING" and has_quit:
                user = "CLOSING"                                # he need not wait for it to answer
            elif event in ("dead", "fail-over") and user in ("PLAYING", "ASKING"):
                user = held
            elif event == "dead" and user == "RETURNING":
                user = "WAITING"                                # the other world has died too
            if user == "ASKING" and healthy:
                user = "CLOSING"
            if event == "fail-over" and user == "WAITING":
                user = "RETURNING"                              # to the other world
        return user

    def one_fate(self, order, has_quit):
        rig, client, link = self.start(has_quit)
        asked = []

        def cause(event):
            {"link": link.sock.close, "silent": lambda: rig.heard("silent"),
             "answers": lambda: rig.heard("answering"), "dead": rig.down,
             "fail-over": lambda: rig.found("life 2", rig.other, AWAY)}[event]()
            rig.settle()
            asked.extend(rig.beat.asks)
            # the heartbeat answers, old questions too
            if rig.hub.health.condition is has.Condition.UP:
                rig.answer(list(asked))
        try:
            sent = self.walk(rig, client, order, lambda events: self.fate(events, has_quit), cause)
            self.assertLessEqual(sent.count("# SILENT"), 1)
            check_consistent(self, rig)
        finally:
            rig.close()

    def test_silence_death_and_fail_over(self):
        events = ("silent", "answers", "dead", "fail-over", "link")
        orders = [order for size in range(1, 6) for order in itertools.permutations(events, size)
                  if self.can_be(order)]
        self.assertGreater(len(orders), 30)
        for order, has_quit in itertools.product(orders, (False, True)):
            with self.subTest(order=order, has_quit=has_quit):
                self.one_fate(order, has_quit)


class TestLoss(unittest.TestCase):
    def test_every_case(self):
        """(tries that failed, a link ended, another is open) -> seconds until it is down."""
        for tries, asking, linked, wanted in (
                ((), False, True, None), ((), True, True, None), ((), False, False, None),
                ((), True, False, 0.3),
                ((False,), False, True, 3), ((False,), True, True, 0), ((False,), False, False, 0),
                ((False,), True, False, 0), ((True,), False, True, 60), ((True,), True, True, 60),
                ((True,), False, False, 0), ((True, False), False, True, 3),
                ((False, True), False, True, 60)):
            with self.subTest(tries=tries, asking=asking, linked=linked):
                loss = has.Loss(1000.0)
                for accepted in tries:
                    loss.tried(accepted, 1000.0)
                self.assertEqual(loss.wait(1000.0, asking, linked, 60),
                                 wanted and self.approximately(wanted))
                if wanted:
                    self.assertEqual(loss.wait(1000.0 + wanted, asking, linked, 60), 0)

    @staticmethod
    def approximately(number):
        return unittest.mock.ANY if number is None else Near(number)


class Watch:
    """Health turned by hand: a clock, timers, users with a link each, and what became of them."""

    def __init__(self, *names, **settings):
        limits = {"hb_timeout": 10, "dead_after": 60, "retry": 1, **settings}
        self.now, self.timers, self.said, self.count = 1000.0, [], [], itertools.count()
        self.users = dict.fromkeys(names, "PLAYING")
        self.lives, self.asked, self.outages = dict.fromkeys(names, "life 1"), [], 0
        self.is_back = False
        self.health = has.Health(types.SimpleNamespace(**limits),
                                 lambda: "PLAYING" in self.users.values())
        self.found("life 1")

    def event(self, name, *arguments):
        for effect, *values in getattr(self.health, name)(*arguments, self.now):
            getattr(self, "do_" + effect)(*values)

    def found(self, life, address=HOME):
        self.event("found", has.World(address, None, has.UNKNOWN, life, False, False))

    def end_link(self, name):
        if self.users[name] == "PLAYING":
            self.users[name] = "ASKING"
            self.event("ended", name, 1, self.lives[name], name)

    def answer(self, life="life 1"):
        asked, self.asked = self.asked, []
        self.event("answered", asked, life)

    def pass_time(self, seconds):
        until = self.now + seconds
        while self.timers and self.timers[0][0] <= until:
            self.now, _, event, arguments = heapq.heappop(self.timers)
            self.event(event, *arguments)
        self.now = until

    def do_later(self, seconds, event, *arguments):
        heapq.heappush(self.timers, (self.now + seconds, next(self.count), event, arguments))

    def do_ask(self, number, serial):
        self.asked.append((number, serial))

    def do_verdict(self, number, serial, left):
        assert self.users[number] == "ASKING", "a verdict nobody waits for"
        self.users[number] = "CLOSING" if left else "RETURNING" if self.health.is_up else "WAITING"

    def hold(self, which):
        self.users = {name: "WAITING" if which(name, state) and state != "CLOSING" else state
                      for name, state in self.users.items()}

    def do_down(self, reason, died):
        assert died <= self.now
        self.outages += 1
        self.hold(lambda name, state: True)

    def do_moved(self, old):
        self.hold(lambda name, state: True)

    def do_reborn(self, died):
        life = self.health.world.life
        self.hold(lambda name, state: state == "ASKING" or self.lives[name] != life)

    def do_up(self, is_new_life):
        back = [name for name, state in self.users.items() if state == "WAITING"]
        self.lives.update(dict.fromkeys(back, self.health.world.life))
        self.users.update(dict.fromkeys(back, "RETURNING"))

    def do_adopt(self, life):
        self.lives.update((name, life) for name, state in self.users.items() if state == "PLAYING")

    def do_say(self, level, text):
        self.said.append(text)

    def do_silence(self, silent):
        self.said.append("silent" if silent else "not silent")

    def do_found(self, lived_on, renewed):
        self.said.append("no news" if renewed else "lived on" if lived_on else "is up")

    def do_became(self, was, seconds):
        assert was is not self.health.condition and seconds >= 0


class TestHealth(unittest.TestCase):
    """Rule 2 and the world's health, without sockets: each order in which things can be learnt."""

    def test_every_order_of_loss_and_return(self):
        """As EveryOrder.test_loss_and_return, by the same oracle; HUP is not Health's business."""
        events = [event for event in EveryOrder.EVENTS if event != "HUP"]
        orders = [order for order in itertools.permutations(events)
                  if order.index("answer") < order.index("heartbeat") < order.index("back")]
        lives = "same", "new", "unknown"
        for order, life, refused in itertools.product(orders, lives, (False, True)):
            watch = Watch("user")
            for count, event in enumerate(order, 1):
                self.cause(watch, event, life, refused)
                wanted = EveryOrder.verdict(order[:count], life, refused, False)
                self.assertEqual(watch.users["user"], wanted, (order[:count], life, refused))

    @staticmethod
    def cause(watch, event, life="same", refused=False):
        lives = {"same": "life 1", "new": "life 2", "unknown": "?2"}
        if event == "link":
            watch.end_link("user")
        elif event == "heartbeat":
            watch.event("lost", "closed by the world", False)
        elif event == "answer":
            watch.answer()
        elif event == "3 s":
            watch.pass_time(3.1)
        elif event == "back":
            watch.found(lives[life])
            watch.is_back = True
        watch.pass_time(0)
        if refused and watch.health.loss:
            watch.event("unreachable", HOME, "refused", False)
        if watch.is_back:                       # the heartbeat asks again what it was asked
            watch.answer(watch.health.world.life)

    def test_every_order_of_silence_death_and_fail_over(self):
        events = ("silent", "answers", "dead", "fail-over", "link")
        for size in range(1, 6):
            for order in filter(EveryOrder.can_be, itertools.permutations(events, size)):
                watch, asked = Watch("user"), []
                for count, event in enumerate(order, 1):
                    {"link": lambda: watch.end_link("user"),
                     "silent": lambda: watch.event("silent"),
                     "answers": lambda: watch.event("answering"),
                     "dead": lambda: watch.event("lost", "no answer", True),
                     "fail-over": lambda: watch.found("life 2", AWAY)}[event]()
                    asked += watch.asked
                    if watch.health.condition is has.Condition.UP:
                        watch.asked = list(asked)
                        watch.answer(watch.health.world.life)
                    wanted = EveryOrder.fate(order[:count], False)
                    self.assertEqual(watch.users["user"], wanted, order[:count])

    # two users and all that can be heard, in every order: what must hold whatever comes

    EVENTS = ("one ends", "two ends", "lost", "refused", "mute", "alive", "answer", "4 s", "silent")

    def test_nobody_asks_for_ever(self):
        """The heartbeat is shut out while others play: who had left just before, or behind it, is
        kept at last."""
        for before in (True, False):
            watch = Watch("one", "two")
            if before:
                watch.end_link("one")
            watch.event("lost", "booted", False)
            if not before:
                watch.end_link("one")
            for _ in range(5):
                watch.event("trouble", HOME, "hung up", True)
                watch.pass_time(1)
            self.assertEqual((watch.users["one"], watch.users["two"]),
                             ("RETURNING", "PLAYING"), before)

    def test_what_holds_in_every_order(self):
        """Nobody leaves but by an answer of his own life; what proves nothing disturbs nobody; who
        waits for a verdict has one when the heartbeat is back; an outage is told once."""
        count = 0
        for order in itertools.permutations(self.EVENTS, 5):
            watch = Watch("one", "two")
            for event in order:
                if event in ("answer", "silent") and watch.health.loss:
                    break                       # cannot be: a lost connection answers nothing
                self.hear(watch, event)
            else:
                count += 1
                self.check(watch, order)
        self.assertGreater(count, 5000)

    @staticmethod
    def hear(watch, event):
        if event == "lost":
            watch.event("lost", "closed", False)
        elif event in ("refused", "mute"):
            watch.event("unreachable", HOME, event, event == "mute")
        elif event == "alive":
            watch.event("trouble", HOME, "hung up", True)
        elif event == "answer":
            watch.answer()
        elif event == "4 s":
            watch.pass_time(4)
        elif event == "silent":
            watch.event("silent")
        else:
            watch.end_link(event.partition(" ")[0])
        watch.pass_time(0)

    def check(self, watch, order):
        states = watch.users.values()
        ended = [name for name in watch.users if f"{name} ends" in order]
        self.assertTrue("answer" in order or "CLOSING" not in states, order)
        if "lost" not in order:
            self.assertNotIn("WAITING", states, order)          # no sign of death
        if {"refused", "mute"}.isdisjoint(order) and len(ended) < 2:
            self.assertEqual(watch.outages, 0, order)
        self.assertLessEqual(watch.outages, 1, order)
        for name in watch.users:
            if name not in ended and not watch.outages:
                self.assertEqual(watch.users[name], "PLAYING", order)
        watch.found("life 1")
        for _ in range(3):
            watch.answer()
            watch.pass_time(1)
        self.assertNotIn("ASKING", watch.users.values(), order)
        self.assertNotIn("WAITING", watch.users.values(), order)

    def test_a_world_with_thousands_dies_in_no_time(self):
        """A loop over all others for each link that ends would stop the main loop for a minute."""
        watch, looks = Watch(*(f"user {n}" for n in range(20000))), []
        watch.health._linked = lambda: looks.append(None)
        watch.event("lost", "closed", False)
        looks.clear()
        began = time.process_time()
        for name in watch.users:
            watch.end_link(name)
        self.assertLess(time.process_time() - began, 3)
        watch.pass_time(0)
        self.assertEqual(len(looks), 1)
        watch.pass_time(1)
        self.assertEqual(set(watch.users.values()), {"WAITING"})

    def test_a_silent_world_is_given_up_in_time_and_only_once(self):
        watch = Watch("user")
        watch.event("silent")
        watch.pass_time(50.9)
        self.assertEqual((watch.users["user"], watch.health.is_up), ("PLAYING", True))
        watch.pass_time(0.2)
        self.assertEqual((watch.users["user"], watch.outages), ("WAITING", 1))
        watch.event("lost", "no answer for 60 s", True)
        self.assertEqual(watch.outages, 1)

    def test_who_may_have_killed_it_did_so_before_it_fell_silent_or_the_heartbeat_was_lost(self):
        lost, refused = ("lost", "closed", False), ("unreachable", HOME, "refused", False)
        for events, died in (((lost, 2, refused, 4), 1000.0), ((("silent",), 51), 991.0)):
            watch, deaths = Watch("user"), []
            watch.do_down = lambda reason, when: deaths.append(when)
            for event in events:
                watch.event(*event) if isinstance(event, tuple) else watch.pass_time(event)
            self.assertEqual(deaths, [died])

    def test_every_effect_has_its_method(self):
        """The list in the docstring, what Health returns, and what the hub can do are the same."""
        source = pathlib.Path(HAS).read_text()
        tree = next(it for it in ast.parse(source).body if getattr(it, "name", "") == "Health")
        firsts = [it.elts[0] for it in ast.walk(tree) if isinstance(it, ast.Tuple) and it.elts]
        returned = {it.value for it in firsts if isinstance(it, ast.Constant)} - {
            *has.Health.SURVIVES, None}
        listed = {name for line in re.findall(r"(?m)^    (\w.*?)  ",
                                              inspect.cleandoc(has.Health.__doc__))
                  for name in re.findall(r"\b[a-z]+\b", line)}
        methods = {name[len("_do_"):] for name in vars(has.Hub) if name.startswith("_do_")}
        self.assertEqual(returned, methods)
        self.assertEqual(listed, methods)


class Near(float):
    def __eq__(self, other):
        return other is not None and abs(self - other) < 1e-6

    __hash__ = None


class HeartbeatAlone(RigCase):
    def test_the_time_of_refused_connects_counts_from_the_first(self):
        """One refused connect after seconds of trouble of HAS's own is one refused connect."""
        rig, client, _ = self.player()
        rig.heard("lost", "booted", False)
        rig.heard("trouble", HOME, "Too many open files", False)
        rig.pass_time(10)
        rig.heard("unreachable", HOME, "refused", False)
        self.assertEqual(state_of(client), "PLAYING")
        rig.pass_time(3.1)
        self.assertEqual(state_of(client), "WAITING")

    def test_a_world_that_hangs_up_on_the_heartbeat_lives(self):
        """Its site was locked, and it was booted: nobody on a living link is dropped, also when
        another leaves."""
        rig = self.rig()
        (alice, link), (bob, other) = rig.player("Alice"), rig.player("Bob")
        rig.heard("lost", "booted", False)
        for _ in range(30):
            rig.heard("trouble", HOME, "not allowed from this host", True)
            rig.pass_time(5)
        other.hangs_up()
        self.assertEqual((state_of(alice), state_of(bob)), ("PLAYING", "ASKING"))
        rig.pass_time(3.1)
        self.assertEqual(state_of(alice), "PLAYING")
        # nobody can say why: he is kept
        self.assertEqual((state_of(bob), bob.lines()), ("RETURNING", ["# OFFLINE"]))

    def test_a_silent_world_is_given_up_also_by_a_hub_whose_heartbeat_is_lost(self):
        rig, client, _ = self.player()
        rig.heard("silent")
        rig.upgrade()
        rig.heard("lost", "TLS cannot be handed over", False)
        for _ in range(10):
            rig.heard("trouble", HOME, "TLS: timed out", True)
            rig.pass_time(6)
        self.assertEqual(state_of(client), "WAITING")

    def test_own_trouble_is_not_the_worlds_death(self):
        """DNS fails, no descriptor is left, the certificate is not accepted: users on open links
        play on."""
        rig, client, link = self.player()
        rig.heard("lost", "booted", False)
        for _ in range(40):
            rig.heard("trouble", HOME, "Name or service not known", False)
            rig.pass_time(3)
        link.says("still here\r\n")
        self.assertEqual((state_of(client), client.lines()), ("PLAYING", ["still here"]))
        newcomer, _ = rig.newcomer()
        self.assertEqual(state_of(newcomer), "LOGIN")
        rig.heard("unreachable", HOME, "Connection refused", False)
        rig.pass_time(3.1)
        self.assertEqual((state_of(client), client.lines()), ("WAITING", ["# OFFLINE"]))

    def test_an_outage_counts_from_when_users_lost_the_world(self):
        for silent in (True, False):
            with self.subTest(silent=silent), mock.patch.object(has.time, "time",
                                                                lambda: 1e9 + rig.clock.now):
                rig = types.SimpleNamespace(clock=Clock())
                rig = self.rig()
                rig.player()
                rig.heard(*(["silent"] if silent else ["lost", "closed", False]))
                rig.pass_time(50)
                if silent:
                    rig.down()
                else:
                    rig.heard("unreachable", HOME, "refused", False)
                    rig.pass_time(3.1)
                self.assertEqual(rig.status()["world"]["since"], 60 if silent else 53)
                rig.found("life 2")
                self.assertEqual(rig.status()["outages"]["seconds"],
                                 60 if silent else 53)

    def test_its_loss_disturbs_nobody(self):
        """Booted, and back within 3 s, whatever is known of the world's life; the same for a
        refused try."""
        for life, refused in itertools.product(("life 1", "?2"), (False, True)):
            with self.subTest(life=life, refused=refused):
                rig, client, link = self.player()
                rig.heard("lost", "closed by the world", False)
                if refused:
                    rig.heard("unreachable", HOME, "refused", False)
                rig.pass_time(2.5)
                rig.found(life)
                rig.pass_time(1, 10, 60)
                link.send("text\r\n")
                client.says("hello\r\n")
                self.assertEqual((client.lines(), link.lines(), state_of(client)),
                                 (["text"], ["hello"], "PLAYING"))

    def test_booted_long_after_an_unknown_life_was_adopted(self):
        rig, client, link = self.player()
        rig.heard("lost", "closed by the world", False)
        rig.found("?2")
        rig.pass_time(6)
        link.hangs_up()
        rig.answer()
        self.assertEqual(state_of(client), "CLOSING")

    def test_all_links_and_the_heartbeat_end_together(self):
        """Down within a second although no try to come back was refused yet."""
        rig = self.rig()
        clients = [rig.player(name) for name in ("Alice", "Bob")]
        rig.heard("lost", "closed by the world", False)
        for _, link in clients:
            link.reset()
        rig.settle()
        rig.pass_time(0.5)
        self.assertEqual([state_of(client) for client, _ in clients], ["WAITING", "WAITING"])

    def test_one_probe_serves_only_who_asked_before_it(self):
        rig = self.rig()
        (one, link), (two, other) = rig.player("Alice"), rig.player("Alice")
        link.hangs_up()
        asks, rig.beat.asks = rig.beat.asks, []
        other.hangs_up()                                      # after the probe was sent
        rig.answer(asks)
        self.assertEqual((state_of(one), state_of(two)), ("CLOSING", "ASKING"))


class ManyEnd(RigCase):
    """Links of several characters that end within a second: no ordinary leaving (rule 2)."""

    def ended(self, names, gap=0.0, **how):
        """(rig, clients) whose links the world has ended, `gap` seconds apart; nothing is answered
        yet."""
        rig = self.rig()
        clients = [rig.player(name, **how) if name else rig.newcomer() for name in names]
        for _, link in clients:
            link.hangs_up()
            rig.pass_time(gap)
        return rig, [client for client, _ in clients]

    def states(self, clients):
        return [state_of(client) for client in clients]

    def test_one_answer_is_not_enough(self):
        for names in (["Alice", "Bob"], ["Alice", "Bob", "Carol"], [None, None],
                      ["guest", "guest"], ["Alice", None]):
            with self.subTest(names=names):
                rig, clients = self.ended(names)
                rig.answer()
                self.assertEqual(set(self.states(clients)), {"ASKING"})
                rig.pass_time(0.49)
                self.assertEqual(rig.beat.asks, [])             # the second probe is sent no sooner
                rig.pass_time(0.02)
                rig.answer()
                self.assertEqual(set(self.states(clients)), {"CLOSING"})

    def test_one_user_leaves_as_quickly_as_ever(self):
        """However many links he has; and others who leave more than a second before or after are
        others."""
        for names, gap in ((["Alice"], 0), (["Alice", "alice", "ALICE"], 0),
                           ([None], 0), (["Alice", "Bob"], 1.01)):
            with self.subTest(names=names, gap=gap):
                rig, clients = self.ended(names, gap)
                rig.answer()
                self.assertEqual(set(self.states(clients)), {"CLOSING"})

    def test_those_who_end_one_by_one(self):
        rig, clients = self.ended(["Alice", "Bob", "Carol"], 0.9)
        rig.answer()
        self.assertEqual(set(self.states(clients)), {"ASKING"})

    def test_the_world_dies_before_the_second_answer(self):
        rig, clients = self.ended(["Alice", "Bob"])
        rig.answer()
        rig.heard("lost", "closed by the world", False)
        rig.pass_time(0.4, 0.4)
        self.assertEqual(self.states(clients), ["WAITING", "WAITING"])

    def test_it_dies_and_is_back_before_the_second_probe(self):
        rig, clients = self.ended(["Alice", "Bob"])
        rig.answer()
        rig.heard("lost", "closed by the world", False)
        rig.found("life 2")
        self.assertEqual(self.states(clients), ["RETURNING", "RETURNING"])

    def test_two_heartbeat_connections_do_not_add_up(self):
        """The first answer came over a connection that has ended since: two answers of the new one
        are needed."""
        rig, clients = self.ended(["Alice", "Bob"])
        rig.answer()
        rig.heard("lost", "booted", False)
        rig.found("life 1")
        for state in ("ASKING", "CLOSING"):
            rig.pass_time(0.51)
            rig.answer()
            self.assertEqual(set(self.states(clients)), {state})

    def test_a_probe_answered_late(self):
        """A frozen world answers half a minute later: that is still the first answer."""
        rig, clients = self.ended(["Alice", "Bob"])
        rig.pass_time(30)
        rig.answer()
        self.assertEqual(set(self.states(clients)), {"ASKING"})

    def test_a_later_leaving_is_judged_by_itself(self):
        rig, clients = self.ended(["Alice", "Bob"])
        rig.heard("lost", "died", False)
        rig.found("life 2")
        links = [rig.game.accept(), rig.game.accept()]
        for link in links:
            rig.let_in(link)
        rig.pass_time(5)
        links[0].hangs_up()
        rig.beat.asks = rig.beat.asks[-1:]
        rig.answer()
        self.assertEqual(self.states(clients), ["CLOSING", "PLAYING"])


# ---- 3. serials

class Serials(RigCase):
    def test_a_verdict_about_an_older_link_is_ignored(self):
        rig, client, link = self.returning()
        rig.let_in(link)
        link.hangs_up()
        (new,) = rig.beat.asks
        for serial in range(new[1]):
            rig.answer([(new[0], serial)])
            self.assertEqual(state_of(client), "ASKING", serial)
        rig.answer([new])
        self.assertEqual(state_of(client), "CLOSING")

    def test_timers_of_an_older_link_are_ignored(self):
        rig, client, link = self.returning()
        rig.pass_time(5)
        link.hangs_up()
        rig.pass_time(1.1)                                      # the second try: its 10 s begin now
        self.assertEqual(state_of(client), "RETURNING")
        rig.pass_time(5)                                        # the first one's are over
        self.assertEqual(state_of(client), "RETURNING")
        rig.pass_time(5.1)
        self.assertEqual(state_of(client), "LOGIN")

    def test_a_check_for_an_older_link_is_ignored(self):
        rig = self.rig("teenymush", up=False)
        client = rig.client()
        rig.found("life 1", checks=True)
        session = client.session
        login = has.Credentials(b"connect", b"Alice", b"pw")
        session.feed.proof.login = login
        session.feed.on_login()
        (number, serial, _), = rig.beat.checks
        rig.post(rig.hub.on_checked, number, serial - 1, [False])
        self.assertIs(session.character.login, login)
        rig.post(rig.hub.on_checked, number, serial, [False])
        self.assertIsNone(session.character.login)

    def test_numbers_are_never_used_again(self):
        rig, seen = self.rig(), []
        for _ in range(5):
            client = rig.client()
            seen.append(client.session.number)
            client.hangs_up()
            rig.pass_time(10.1)
            rig.answer([(seen[-1], 1)])                         # a verdict for one who is gone
        self.assertEqual(seen, sorted(set(seen)))


# ---- 4. timers

class Timers(RigCase):
    def tries(self, rig, client, seconds):
        """When, in steps of half a second, a new try to connect was made."""
        found, last = [], client.session.serial
        for step in range(1, int(seconds * 2) + 1):
            rig.pass_time(0.5)
            if client.session.serial != last:
                found.append(step / 2)
                last = client.session.serial
        return found

    def test_back_off(self):
        wanted = [1, 3, 7, 15, 31, 61, 91, 121]                 # 1, 2, 4, 8, 16, 30, 30, 30 s apart
        for column in ("LOGIN", "RETURNING"):
            with self.subTest(state=column):
                rig = self.rig()
                client = rig.returning()[0] if column == "RETURNING" else None
                rig.game.sock.close()                           # from now on connects are refused
                if client:
                    rig.game.peers[-1].sock.close()
                client = client or rig.client()
                rig.settle()
                self.assertEqual(self.tries(rig, client, 125), wanted)

    def test_a_refused_newcomer_is_told_once_after_5_s(self):
        rig = self.rig()
        rig.game.sock.close()
        client = rig.client()
        rig.pass_time(*[0.5] * 9)
        self.assertEqual(client.lines(), [])
        rig.pass_time(*[0.5] * 60)
        self.assertEqual(client.lines(), ["# OFFLINE"])

    def test_what_he_typed_goes_on_when_the_link_opens(self):
        rig = self.rig(up=False)
        client = rig.client()
        client.says("connect Alice pw\r\n")
        rig.found("life 1")
        self.assertIn("connect Alice pw", rig.game.accept().lines())

    def test_login_hold_and_hold(self):
        # login typed before, during or not at all; seconds after which he is let go
        for typed, login_hold, hold, wanted in (
                ("never", 300, 0, 300), ("before", 300, 0, None), ("during", 300, 0, None),
                ("never", 0, 0, None),
                ("before", 300, 900, 900), ("during", 300, 900, 900), ("before", 900, 300, 300)):
            with self.subTest(typed=typed, login_hold=login_hold, hold=hold):
                rig = self.rig(login_hold=login_hold, hold=hold)
                client = rig.player()[0] if typed == "before" else rig.client()
                rig.down()
                if typed == "during":
                    client.says("connect Alice pw\r\n")
                client.read()
                steps = [step for step in range(100, 1500, 100) if rig.pass_time(100)
                         or state_of(client) == "CLOSING"]
                self.assertEqual(steps[:1], [wanted] if wanted else [])
                said = [line for line in client.lines() if "OFFLINE for" not in line]
                self.assertEqual(len(said), 1 if wanted else 0)

    def test_a_hold_ends_with_the_wait_it_was_for(self):
        """The next wait begins anew, also where the world was started anew and never seen down."""
        rig, client, link = self.returning(hold=300)
        rig.pass_time(1)
        rig.let_in(link)
        rig.pass_time(285)
        rig.found("life 3")                                     # 286 s after the first wait began
        for wait in (1, 2, 4, 8):
            rig.game.accept().sock.close()                      # it is full
            rig.settle(lambda: state_of(client) == "BACKOFF")
            rig.pass_time(wait + 0.1)
        self.assertEqual(state_of(client), "RETURNING")

    def test_closing_lasts_10_s_at_most_and_ignores_input(self):
        rig = self.rig()
        client, _ = bring_to(rig, "CLOSING")
        client.send("connect Bob pw\r\nhello\r\n")
        rig.pass_time(9.9)
        self.assertEqual((state_of(client), client.lines()), ("CLOSING", []))
        rig.pass_time(0.2)
        self.assertTrue(is_gone(client))

    def test_half_closed_client_gets_its_answers(self):
        """What he typed last is carried out and all of the answer reaches him, though it does not
        fit at once."""
        rig, client, link = self.player()
        client.send("WHO\r\n")
        client.sock.shutdown(socket.SHUT_WR)
        rig.settle()
        link.read()
        self.assertTrue(link.ended)
        sent = 0
        while len(client.session.client.out) < 100000:          # more than the socket takes
            sent += link.sock.send(b"line\r\n" * 1000)
            rig.settle()
        link.hangs_up()
        got = sum(rig.settle() or len(client.read()) for _ in range(50))
        self.assertEqual(got, sent)

    def test_last_resort_of_a_return(self):
        rig, client, link = self.returning()
        link.send("something strange\r\n")
        client.says("hello\r\n")
        rig.pass_time(9.9)
        self.assertEqual((state_of(client), client.lines()), ("RETURNING", []))
        link.read()
        rig.pass_time(0.2)
        self.assertEqual((state_of(client), client.lines()),
                         ("LOGIN", ["# ONLINE", "something strange"]))
        self.assertEqual(link.lines(), ["hello"])

    def test_unsent_lines_ten_a_second_then_a_count(self):
        rig, client, _ = self.player()
        rig.down()
        client.read()
        client.says("".join(f"line {n}\r\n" for n in range(25)))
        self.assertEqual(client.lines(), [f"# UNSENT line {n}" for n in range(10)])
        rig.pass_time(1.1)
        self.assertEqual(client.lines(), ["# UNSENT (and 15 lines more)"])
        client.says("again\r\n")
        self.assertEqual(client.lines(), ["# UNSENT again"])

    def test_the_count_is_told_before_his_return_or_by_the_next_process(self):
        for login in (True, False):
            for event in ("return", "upgrade", "upgrade, return"):
                with self.subTest(event, login=login):
                    rig = self.rig()
                    client = rig.player()[0] if login else rig.client()
                    rig.down()
                    client.says("".join(f"line {n}\r\n" for n in range(25)))
                    client.read()
                    if "upgrade" in event:
                        rig.upgrade()
                    if "return" in event:
                        rig.found("life 2")
                        rig.game.accept()
                    else:
                        rig.pass_time(1.1)
                    self.assertEqual(client.lines()[:1], ["# UNSENT (and 15 lines more)"])
                    rig.pass_time(1.1)
                    self.assertNotIn("UNSENT", "".join(client.lines()))

    def test_unsent_lines_are_answered_in_the_next_outage_too(self):
        rig, client, _ = self.player()
        rig.down()
        client.says("".join(f"line {n}\r\n" for n in range(12)))
        rig.found("life 2")                                     # before the second is over
        rig.let_in(rig.game.accept())
        rig.pass_time(5)
        rig.down()
        client.read()
        client.says("hello\r\n")
        self.assertEqual(client.lines(), ["# UNSENT hello"])


class End:
    """One end of a connection, exactly as RFC 1143 wants it, with a mind of its own."""

    OPTIONS = (1, 3, 5, 24, 25, 31, 39, 42, 69, 91, 201)

    def __init__(self, rng, peer):
        self.rng, self.peer, self.scanner, self.text = rng, peer, has.Scanner(), b""
        self.state = {}                             # (WILL: ours, DO: theirs; option) -> state
        self.likes = {(side, option) for side in (WILL, DO) for option in self.OPTIONS
                      if rng.random() < 0.7}

    def read(self):
        """Take what came, answer it."""
        for is_command_, piece in self.scanner.feed(self.peer.read()):
            if not is_command_:
                self.text += piece
            elif len(piece) == 3:
                side = DO if piece[1] in (WILL, WONT) else WILL
                self._take(piece[1] in (WILL, DO), side, piece[2])

    def _take(self, yes, side, option):
        before, on = self.state.get((side, option), "no"), yes and (side, option) in self.likes
        if before in ("no", "yes") and yes is not (before == "yes"):
            self._say(on, side, option)
        agreed = on if before == "no" else yes and before != "want no"
        self.state[side, option] = "yes" if agreed else "no"

    def _say(self, yes, side, option):
        self.peer.send(command(side if yes else {WILL: WONT, DO: DONT}[side], option))
        if yes and (side, option) in ((WILL, NAWS), (DO, GMCP)):
            self.peer.send(naws(80, 24) if side == WILL else CORE_HELLO)

    def ask(self):
        """Ask for something, or end it."""
        side, option = key = self.rng.choice((WILL, DO)), self.rng.choice(self.OPTIONS)
        before = self.state.get(key, "no")
        if before == "no" and key in self.likes or before == "yes" and self.rng.random() < 0.4:
            self.state[key] = "want yes" if before == "no" else "want no"
            verb = side if before == "no" else {WILL: WONT, DO: DONT}[side]
            self.peer.send(command(verb, option))


class EveryNegotiation(RigCase):
    """Whatever a client and one world after another say, in whatever order: in the end both think
    the same of every option, and nobody waits for an answer."""

    def negotiate(self, seed):
        rng, rig = random.Random(seed), self.rig()
        client = rig.client()
        user, world = End(rng, client), End(rng, rig.game.accept())
        client.send("connect Alice pw\r\n")

        def turns(most, both=True):
            for _ in range(rng.randint(0, most)):
                for end, chance in ((world, 0.5 * both), (user, 0.3)):
                    if rng.random() < chance:
                        end.ask()
                if rng.random() < 0.8:
                    exchange(1, both)

        def exchange(times=8, both=True):
            for _ in range(times):
                rig.settle()
                for end in (user, world)[:1 + both]:
                    end.read()

        for life in range(rng.randint(2, 4)):
            if life:
                rig.down()
                exchange(1, False)
                turns(4, False)
                rig.found(f"another life {life}")
                world = End(rng, rig.game.accept())
            turns(6)
            exchange(2)
            mark = re.findall(rb"OUTPUTPREFIX (=[0-9a-f]{10}=)\r", world.text)[-1]
            info = b"### Begin INFO\r\nVersion: MUX\r\n### End INFO\r\n" if life else b""
            world.peer.send(b"Welcome\r\n" + mark + b"\r\n" + info)
            turns(8)
            exchange(rng.choice((0, 8)))
        exchange()
        self.assertEqual(client.session.state.name, "PLAYING")
        rig.pass_time(3, 10)
        exchange()
        for side, other in ((WILL, DO), (DO, WILL)):
            for option in End.OPTIONS:
                self.assertEqual((user.state.get((side, option), "no"), option),
                                 (world.state.get((other, option), "no"), option))
                self.assertNotIn("want", user.state.get((side, option), "no"))
        self.doCleanups()

    def test_both_ends_agree_in_the_end(self):
        for seed in [*range(60), secrets_seed()]:
            with self.subTest(seed=seed):
                self.negotiate(seed)


class StuckClient(RigCase):
    def fill(self, rig, client, link, until=None):
        """The world sends until the link is not read any more, or `until` bytes went on."""
        sent, line = 0, b"x" * 98 + b"\r\n"
        while sent < (until or 1 << 26) and (until or not client.session.client.full):
            try:
                sent += link.sock.send(line * 600)
            except BlockingIOError:
                break
            rig.settle()
        return sent

    def start(self, **settings):
        rig, client, link = self.player(**settings)
        self.fill(rig, client, link)
        return rig, client, link

    def drain(self, rig, client):
        got = chunk = client.read()
        while chunk:
            rig.settle()
            chunk = client.read()
            got += chunk
        return got

    def is_read(self, rig, client):
        link = client.session.link
        return link.sock in [key.fileobj for key in rig.hub.selector.get_map().values()]

    def test_the_link_is_paused_and_goes_on_when_there_is_room(self):
        rig, client, link = self.start()
        self.assertFalse(self.is_read(rig, client))
        got = self.drain(rig, client)
        self.assertTrue(self.is_read(rig, client))
        self.assertNotIn(b"output lost", got)

    def test_a_pause_ends_after_2_s_and_old_lines_are_lost(self):
        rig, client, link = self.start(output_limit=400000)
        rig.pass_time(1.9)
        self.assertFalse(self.is_read(rig, client))
        rig.pass_time(0.2)
        self.assertTrue(self.is_read(rig, client))
        self.fill(rig, client, link, 3000000)
        self.assertLessEqual(len(client.session.client.out), 400000 + 65536)
        link.says("the end\r\n")
        got = self.drain(rig, client)
        self.assertRegex(got, rb"\r\n<output lost: \d+ lines>\r\n(x{98}\r\n)+the end\r\n\Z")
        self.assertEqual(set(got.split(b"\r\n")) - {b"x" * 98, b""} - {b"the end"},
                         set(re.findall(rb"<output lost: \d+ lines>", got)))

    def test_a_client_that_never_reads_is_bounded_over_returns(self):
        rig, client, link = self.start(output_limit=400000)
        # the crash comes before its 2 s are over
        rig.pass_time(1)
        for life in ("life 2", "life 3", "life 4"):
            rig.restart(life)
            link = rig.game.accept()
            rig.let_in(link)
            self.assertEqual(state_of(client), "PLAYING")
            self.assertTrue(self.is_read(rig, client))
            self.fill(rig, client, link, 1000000)
            self.assertLessEqual(len(client.session.client.out), 400000 + 65536)
        client.session.screen.stuck = False                            # as in a new process
        has.Passage(client.session).go_on()
        self.fill(rig, client, link, 1000000)
        self.assertLessEqual(len(client.session.client.out), 400000 + 65536)
        self.assertRegex(self.drain(rig, client), rb"output lost")
        self.assertFalse(client.session.screen.stuck)

    def test_two_short_pauses_are_no_long_one(self):
        rig, client, link = self.start()
        rig.pass_time(1)
        self.drain(rig, client)
        rig.pass_time(0.5)
        self.fill(rig, client, link)
        # 2.1 s after the first, 0.6 s after the second began
        rig.pass_time(0.6)
        self.assertFalse(self.is_read(rig, client))

    def test_closed_after_10_minutes_without_reading(self):
        rig, client, _ = self.start()
        rig.pass_time(*[60] * 9)
        self.assertEqual(state_of(client), "PLAYING")
        rig.pass_time(61)
        self.assertTrue(is_gone(client))

    def test_a_slow_reader_is_not_closed(self):
        rig, client, link = self.start()
        for _ in range(15):
            client.sock.recv(25000)
            rig.pass_time(60)
        self.assertEqual(state_of(client), "PLAYING")

    def test_shorten(self):
        lines = [b"line %d\r\n" % n for n in range(1000)]
        telnet = b"\xff\xfb\x01"
        cases = {"lines": b"".join(lines), "telnet among them": b"".join(lines[:50])
                 + telnet + b"".join(lines[50:]),
                 "counted twice": b"".join(lines[:3]) + b"<output lost: 7 lines>\r\n"
                 + b"".join(lines[3:])}
        for name, text in cases.items():
            with self.subTest(name):
                out = bytes(has.shorten(bytearray(text), 2000, told_of))
                self.assertLess(len(out), 2100)
                self.assertTrue(out.startswith(lines[0]) and out.endswith(lines[-1]))
                (lost,) = re.findall(rb"<output lost: (\d+) lines>\r\n", out)
                kept = len(re.findall(rb"line \d+\r\n", out))
                self.assertEqual(int(lost) + kept, 1000 + 7 * (name == "counted twice"))
                self.assertEqual(out.count(telnet), text.count(telnet))

    def test_shorten_keeps_a_telnet_sequence_with_a_newline_in_it(self):
        gmcp = b"\xff\xfa\xc9Some.Thing {\n \"a\": 1\n}\xff\xf0"
        text = b"first\r\n" + gmcp.join([b"some line\r\n" * 20] * 20) + b"last\r\n"
        for limit in range(1000, 1300):
            out = bytes(has.shorten(bytearray(text), limit, told_of))
            self.assertEqual(out.count(gmcp), text.count(gmcp), limit)


# ---- 5. rules

class Waiting(RigCase):
    """Rule 3."""

    def waiting(self, rig=None):
        rig = rig or self.rig()
        client, _ = rig.newcomer()
        rig.down()
        client.read()
        return rig, client

    def test_a_login_is_kept_never_echoed_and_tried(self):
        for typed in ("connect Alice secret\r\n", 'connect "Alice" secret\r\n',
                      "connect Alice secret\n", "cr Alice secret\r\n",
                      "connect Alicex\b secret\r\n"):
            with self.subTest(typed):
                rig, client = self.waiting()
                for byte in typed:
                    client.send(byte)
                rig.settle()
                sent = client.read()
                self.assertNotIn(b"secret", sent)
                self.assertIn(b"You will be logged in", sent)
                rig.found("life 2")
                self.assertEqual(state_of(client), "RETURNING")
                self.assertRegex(rig.game.accept().read(), rb'"?Alice"? secret\r\n')

    def test_a_login_typed_before_the_world_was_ever_seen(self):
        """HAS started while the world was down: clients that log in by themselves send it exactly
        once."""
        for family in ("auto", "tinymux"):
            with self.subTest(mush_type=family):
                rig = self.rig(up=False, mush_type=family)
                rig.heard("unreachable", HOME, "refused", False)
                client = rig.client()
                self.assertEqual(client.lines(), ["# OFFLINE"])
                client.says("connect Alice secret\r\n")
                self.assertNotIn(b"secret", client.read())
                rig.found("life 1")
                self.assertIn(b"connect Alice secret", rig.game.accept().read())

    def test_an_unconfirmed_login_is_tried_again(self):
        rig = self.rig()
        client = rig.client()
        client.says("connect Alice secret\r\n")
        rig.game.accept()
        rig.restart("life 2")
        self.assertIn(b"connect Alice secret", rig.game.accept().read())

    def test_a_refused_login_is_tried_once(self):
        rig, client = self.waiting()
        client.says("connect Alice wrong\r\n")
        rig.found("life 2")
        link = rig.game.accept()
        client.read()
        rig.let_in(link, None)
        self.assertEqual((state_of(client), client.lines()), ("LOGIN", [
            "# REFUSED", "Either that player does not exist, or has a different password."]))
        rig.down()
        self.assertEqual((state_of(client), client.session.character.pending), ("WAITING", None))

    def test_whatever_the_world_says_a_return_without_a_login_ends_at_the_login_screen(self):
        """Guests are off, names taken, texts edited: the world's words are shown at the first try,
        on the same link."""
        for family, typed, words in (
                ("tinymux", "connect guest", "Guest logins are disabled."),
                ("tinymux", "connect Alice pw", "Go away."),
                ("tinymux", "create Alice pw",
                 "Either there is already a player with that name, or that name is illegal."),
                ("tinymush", "create Alice pw", "Online character creation is not allowed.")):
            for typed_at in ("before", "during"):
                with self.subTest(typed, family=family, typed_at=typed_at):
                    rig, client, link = self.newcomer(family=family)
                    if typed_at == "before":
                        client.says(typed + "\r\n")
                    rig.down()
                    if typed_at == "during":
                        client.says(typed + "\r\n")
                    rig.found("life 2")
                    link = rig.game.accept()
                    client.read()
                    self.assertIn(typed, link.lines())
                    link.says("Welcome\r\n" + words + "\r\n### Begin INFO 1\r\nUptime: x\r\n### "
                                                      "End INFO\r\n")
                    self.assertEqual((state_of(client), client.lines()),
                                     ("LOGIN", ["# REFUSED", "Welcome", words]))
                    client.says("WHO\r\n")
                    self.assertEqual(link.lines(), ["WHO"])
                    rig.restart("life 3")
                    self.assertEqual((state_of(client), rig.game.accept().lines()), ("LOGIN", []))

    def test_a_first_login_shows_what_the_world_says_to_it(self):
        """Only returns are silent: who logs in for the first time has seen neither room nor
        news."""
        rig, client = self.waiting()
        client.says("connect Alice secret\r\n")
        rig.found("life 2")
        link = rig.game.accept()
        client.read()
        rig.let_in(link, "The Hall\r\nA room.")
        self.assertEqual((state_of(client), client.lines()),
                         ("PLAYING", ["# ONLINE", "The Hall", "A room."]))
        rig.restart("life 3")
        client.read()
        rig.let_in(rig.game.accept(), "The Hall\r\nA room.")
        self.assertEqual((state_of(client), client.lines()), ("PLAYING", ["# ONLINE"]))

    def test_who_was_created_connects_the_next_time(self):
        for family, typed, sent in (("tinymux", "cr Alice secret", "cr"),
                                    ("teenymush", "c Alice secret", "create")):
            with self.subTest(family):
                rig, client = self.waiting(self.rig(family))
                client.says(typed + "\r\n")
                self.assertNotIn(b"secret", client.read())
                rig.found("life 2")
                link = rig.game.accept()
                self.assertIn(f"{sent} Alice secret", link.lines())
                if family == "tinymux":
                    link.send(nonce_of(rig, client) + b"\r\n### End INFO\r\n")
                else:
                    link.says("Last connect was from here\r\n")
                    link.send(b"\xff\xfc\x56")
                rig.settle()
                self.assertEqual(state_of(client), "PLAYING")
                rig.restart("life 3")
                self.assertIn("connect Alice secret", rig.game.accept().lines())

    def test_a_create_that_the_world_hung_up_on_is_not_sent_again(self):
        """PennMUSH shows register.txt and closes; a full world is no refusal of a connect."""
        for typed, again in (("create Alice pw", False), ("connect Alice pw", True)):
            with self.subTest(typed):
                rig, client = self.waiting()
                client.says(typed + "\r\n")
                rig.found("life 2")
                link = rig.game.accept()
                link.send("Please register by mail.\r\n")
                link.hangs_up()
                rig.pass_time(1.1)
                self.assertEqual(any("Alice" in line for line in rig.game.accept().lines()), again)
                self.assertIn("Please register by mail.", client.lines())

    def test_telnet_is_answered(self):
        """telnet(1) shows nothing more until its TIMING-MARK is answered (Ctrl-C)."""
        rig, client = self.waiting()
        for asked, answer in ((b"\xff\xf4\xff\xfd\x06", b"\xff\xfc\x06"),
                              (b"\xff\xf6", b"\r\n[Yes]\r\n"), (b"\xff\xfd\x45", b"\xff\xfc\x45"),
                              (b"\xff\xfb\x5b", b"\xff\xfe\x5b"), (b"\xff\xfe\x03", b""),
                              (b"\xff\xfc\x1f", b""), (b"\xff\xfb\x1f", b""), (b"\xff\xf1", b"")):
            with self.subTest(asked):
                client.says(asked)
                self.assertEqual(client.read(), answer)
        rig.found("life 2")
        link = rig.game.accept()
        self.assertEqual(link.read(), b"\xff\xfb\x1f")        # the size it was offered
        client.read()
        link.says(b"\xff\xfd\x1f")
        self.assertEqual((client.read(), link.read()), (b"\xff\xfd\x1f", b""))
        client.says(b"\xff\xfa\x1f\x00P\x00\x18\xff\xf0")
        self.assertEqual(link.read(), b"\xff\xfa\x1f\x00P\x00\x18\xff\xf0")

    def test_what_he_asks_the_new_world_himself_is_answered_to_him(self):
        """Ctrl-C in telnet(1) once more: the first WONT TIMING-MARK of a new link is for him."""
        rig, client, link = self.player()
        link.says(command(WILL, ECHO) + command(DO, NAWS))
        client.says(command(DONT, ECHO) + command(WILL, NAWS))
        link.read(), client.read()
        rig.restart("life 2")
        link = rig.game.accept()
        rig.let_in(link)
        link.read(), client.read()
        for asked, answer in ((command(DO, 6), command(WONT, 6)),
                              (command(WILL, 91), command(DONT, 91)),
                              (command(DO, ECHO), command(WILL, ECHO)),
                              (command(WILL, 39), command(DO, 39)),
                              (command(DO, 6), command(WONT, 6))):
            with self.subTest(asked):
                client.says(asked)
                self.assertEqual(link.read(), asked)
                link.says(answer)
                self.assertEqual(client.read(), answer)

    def test_what_the_world_has_left_unanswered_is_answered(self):
        """Ctrl-C just before the world died, or fell silent."""
        rig, client, link = self.player()
        link.says(command(WILL, ECHO) + command(DO, NAWS))
        client.says(command(DO, ECHO) + command(WILL, NAWS) + command(DO, 6) + command(WILL, 91)
                    + command(DO, 3) + command(WILL, TTYPE) + command(WONT, 39))
        link.says(command(WILL, 3))
        client.read()
        rig.heard("silent")
        self.assertEqual(client.read(), command(WONT, 6) + b"# SILENT\r\n")
        link.send(command(WONT, 6))             # late
        client.says(command(DONT, 3))
        self.assertEqual(client.read(), b"")
        rig.down()
        self.assertEqual(client.read(), command(DONT, 91) + command(WONT, 3)
                         + command(WONT, ECHO) + b"# OFFLINE\r\n")
        rig.found("life 2")
        self.assertIn(command(WILL, TTYPE), rig.game.accept().read())

    def test_a_synch_is_read_whole(self):
        """Its last byte is sent as urgent data (RFC 854)."""
        rig = self.rig()
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours, theirs = socket.create_connection(server.getsockname()), server.accept()[0]
        self.addCleanup(ours.close)
        rig.hub.door.on_accept(theirs, "203.0.113.9", False)
        rig.settle()
        link = rig.game.accept()
        ours.sendall(b"WHO\r\n\xff")
        ours.send(b"\xf2", socket.MSG_OOB)
        ours.sendall(b"INFO\r\n")
        rig.settle()
        self.assertEqual(link.read(), b"WHO\r\n\xff\xf2INFO\r\n")

    def test_an_old_world_does_not_take_offers_for_text(self):
        rig, client, _ = self.newcomer(family="teenymush")
        rig.down()
        client.says(b"\xff\xfb\x1f\xff\xfa\x2a\x02UTF-8\xff\xf0")
        rig.hub.mailbox.post(rig.hub.on_world_found,
                             has.World(HOME, rig.game.target, rig.family,
                                       "life 2", False, False, telnet=False))
        rig.settle()
        self.assertNotIn(b"\xff", rig.game.accept().read())

    def test_only_changes_are_answered(self):
        """What the client repeats is on already: RFC 1143 (two sides that answer each answer never
        end)."""
        rig, client, link = self.player()
        link.says(b"\xff\xfd\x1f\xff\xfb\x01")
        client.says(b"\xff\xfb\x1f\xff\xfd\x01")
        link.says(b"\xff\xfd\x2a")
        client.says(b"\xff\xfb\x2a")
        rig.down()
        client.read()
        for asked, answer in ((b"\xff\xfb\x1f", b""), (b"\xff\xfc\x1f", b"\xff\xfe\x1f"),
                              (b"\xff\xfc\x1f", b""),
                              # the last answers HAS's own WONT ECHO
                              (b"\xff\xfb\x2a", b""), (b"\xff\xfe\x01", b"")):
            client.says(asked)
            self.assertEqual(client.read(), answer, asked)

    def test_a_world_without_telnet_gets_nothing_of_what_was_offered_while_it_was_away(self):
        rig = self.rig("tinymush", up=False)
        rig.heard("unreachable", HOME, "refused", False)
        client = rig.client()
        client.says(b"\xff\xfb\x1f\xff\xfb\x18")
        client.read()
        rig.found("life 1")
        link = rig.game.accept()
        rig.settle()
        self.assertEqual(link.read(), b"")
        self.assertIn(b"\xff\xfd\x18\xff\xfd\x1f", client.read())
        client.says(b"\xff\xfb\x1f")
        self.assertEqual((client.read(), link.read()), (b"", b""))

    def test_a_frozen_world_is_not_waited_for(self):
        rig, client, link = self.player()
        rig.heard("silent")
        client.says(b"\xff\xf4\xff\xfd\x06\xff\xf6\xff\xfd\x03")
        self.assertIn(b"\xff\xfc\x06\r\n[Yes]\r\n", client.read())
        self.assertEqual(link.read(), b"\xff\xf4\xff\xfd\x03")  # not answered twice

    def test_kept_timing_marks_in_every_split(self):
        data = (b"a\xff\xff\xfd\x06b\xff\xf4\xff\xfd\x06"
                b"\xff\xfa\x1f\x06\xfd\x06\x06\xff\xf0\xff\xfd\x06")
        for at in range(len(data)):
            rig, client, link = self.player()
            link.hangs_up()
            for part in (data[:at], data[at:]):
                client.says(part)
            client.says(b"\xff\xf6")
            self.assertEqual((client.read(), client.session.inbox.kept),
                             (b"\xff\xfc\x06" * 2 + b"\r\n[Yes]\r\n",
                              data.replace(b"\xf4\xff\xfd\x06", b"\xf4")[:-3]))

    def test_a_timing_mark_is_answered_while_a_verdict_or_a_return_is_awaited(self):
        for state in ("ASKING", "RETURNING"):
            with self.subTest(state):
                rig, client, link = (self.player if state == "ASKING" else self.returning)()
                if state == "ASKING":
                    link.hangs_up()
                client.read()
                client.says(b"hello\xff\xf4\xff\xfd\x06\r\n")
                self.assertEqual((state_of(client), client.read()), (state, b"\xff\xfc\x06"))

    def test_what_clients_send_by_timer_is_swallowed(self):
        rig, client = self.waiting()
        for line in ("IDLE", "idle", "IDLE x", "@@", "@@ still here", "", "  ", "\0", "\0\0"):
            client.send(line + "\r\n")
        rig.settle()
        self.assertEqual(client.lines(), [])
        for line in ("IDLEx", "@", "idler"):
            client.send(line + "\r\n")
        rig.settle()
        self.assertEqual(client.lines(), ["# UNSENT IDLEx", "# UNSENT @", "# UNSENT idler"])

    def test_who_waits_is_told_once_a_while_how_long_it_has_lasted(self):
        rig, client = self.waiting()
        for _ in range(20):
            client.send("\r\n")
            rig.pass_time(60)
        told = client.lines()
        self.assertEqual(len(told), 4)
        self.assertRegex(told[0], r"\A# NOTICE # This world has been OFFLINE for \w+\. Still "
                                  r"waiting\.\Z")
        rig.found("life 2")
        rig.pass_time(1200)
        self.assertFalse([line for line in client.lines() if "OFFLINE" in line])

    def test_answers_to_one_who_does_not_read_are_bounded(self):
        rig, client = self.waiting()
        for typed in ("connect Alice pw\r\n", "hello\r\n", "@remotehostname x\r\n",
                      "x" * 100 + "\r\n"):
            for _ in range(400):
                try:
                    client.sock.send(typed.encode() * 1000)
                except BlockingIOError:
                    pass
                rig.settle()
                rig.clock.advance(0.1)
        self.assertLess(len(client.session.client.out), 2 * has.HIGH_WATER)

    def test_lines(self):
        for typed, wanted in (("hello", "# UNSENT hello"), ("a\x1b[31mb", "# UNSENT a[31mb"),
                              ("connect Alice", "# UNSENT connect Alice"),
                              ("caf\u00e9", "# UNSENT caf\u00c3\u00a9")):
            with self.subTest(typed):
                rig, client = self.waiting()
                client.says(typed + "\r\n")
                self.assertEqual(client.lines(), [wanted])

    def test_quit_leaves(self):
        for typed in ("QUIT\r\n", "quit\n", "hello\r\nQUIT\r\nhello\r\n"):
            with self.subTest(typed):
                rig, client = self.waiting()
                client.says(typed)
                client.read()
                self.assertEqual((state_of(client), client.ended), ("CLOSING", True))

    def test_a_quit_typed_while_a_verdict_is_awaited_leaves(self):
        rig, client, link = self.player()
        link.hangs_up()
        client.says("QUIT\r\n")
        rig.down()
        self.assertEqual(state_of(client), "CLOSING")

    def test_a_line_typed_while_a_verdict_was_awaited_comes_back_unsent(self):
        for verdict in ("world down", "verdict: other life", "world reborn"):
            with self.subTest(verdict):
                rig, client, link = self.player()
                link.hangs_up()
                client.says("hello\r\n")
                self.assertEqual((state_of(client), client.lines()), ("ASKING", []))
                cause(rig, verdict, client, None)
                rig.settle()
                self.assertEqual(client.lines(), ["# OFFLINE", "# UNSENT hello"])

    def test_over_long_line(self):
        rig, client = self.waiting()
        for _ in range(20):
            client.says("x" * 5000)
        client.says("\r\nhello\r\n")
        self.assertEqual(client.lines()[-1], "# UNSENT hello")

    def test_spoof_word_is_not_kept(self):
        rig, client = self.waiting(self.rig("teenymush"))
        client.says("@remotehostname 1.2.3.4\r\n@remo\x00te\xffhostname".encode("latin-1")
                    + b"\r\n")
        self.assertNotIn(b"1.2.3.4", client.read())
        rig.found("life 2")
        self.assertNotIn(b"1.2.3.4", rig.game.accept().read())


class Leaving(RigCase):
    """Rule 2: his last complete line was QUIT, and the link ended within 10 s; else a verdict is
    asked for."""

    def test_table(self):
        for typed, seconds, wanted in (
                (["QUIT\r\n"], 0, "CLOSING"), (["QUIT\r\n"], 9.9, "CLOSING"),
                (["QUIT\r\n"], 10.1, "ASKING"),
                (["QUIT\r\nsay x\r\n"], 0, "ASKING"), (["QUIT\r\n", "say x\r\n"], 0, "ASKING"),
                (["say x\r\nQUIT\r\n"], 0, "CLOSING"), (["QUIT\r\n", "say"], 0, "CLOSING"),
                (["QUIT"], 0, "ASKING"),
                (["QUIT\r\n", "say x\r\n", "QUIT\r\n"], 9.9, "CLOSING")):
            with self.subTest(typed=typed, seconds=seconds):
                rig, client, link = self.player()
                for text in typed:
                    client.says(text)
                rig.pass_time(seconds)
                link.sock.close()
                rig.settle(lambda: client.session.link is None)
                self.assertEqual(state_of(client), wanted)


class Silence(RigCase):
    def test_newcomer_of_a_silent_world_is_told_if_he_types(self):
        rig = self.rig()
        rig.heard("silent")
        client = rig.client()
        client.says("WHO\r\nWHO\r\n")
        self.assertEqual(client.lines(), ["# SILENT"])

    def test_who_sees_nothing_is_told_at_once(self):
        """A newcomer to a silent world, and one whose login screen had not come when it fell
        silent."""
        rig = self.rig()
        early, greeted = rig.client(), rig.client()
        for client in (early, greeted):
            link = rig.game.accept()
        link.says("Welcome\r\n")
        rig.heard("silent")
        late = rig.client()
        rig.pass_time(1)
        self.assertEqual([client.lines() for client in (early, greeted, late)],
                         [["# SILENT"], ["Welcome"], ["# SILENT"]])

    def test_who_typed_since_it_answered_last_is_told_when_that_is_known(self):
        rig = self.rig()
        (early, _), (late, _) = rig.player(), rig.player("Bob")
        rig.pass_time(rig.hub.settings.hb_timeout)
        late.says("say into the ice\r\n")
        rig.pass_time(rig.hub.settings.hb_timeout - 1)
        rig.heard("silent")
        self.assertEqual((early.lines(), late.lines()), ([], ["# SILENT"]))
        rig.heard("answering")
        self.assertEqual((early.lines(), late.lines()), ([], []))

    def test_lines_typed_at_a_silent_world_come_back_unsent_when_it_is_given_up(self):
        rig = self.rig()
        (client, link), (other, _) = rig.player(), rig.player("Bob")
        rig.pass_time(rig.hub.settings.hb_timeout)
        rig.heard("silent")
        for line in ("one", "@@", "two"):
            client.says(line + "\r\n")
        self.assertEqual((client.lines(), link.lines()), (["# SILENT"], ["one", "@@", "two"]))
        rig.down()
        self.assertEqual(client.lines(), ["# OFFLINE", "# UNSENT one", "# UNSENT two"])
        self.assertEqual(other.lines(), ["# OFFLINE"])

    def test_lines_typed_at_a_silent_world_that_answers_again_were_carried_out(self):
        rig, client, _ = self.player()
        rig.heard("silent")
        client.says("one\r\n")
        rig.heard("answering")
        rig.down()
        self.assertEqual(client.lines(), ["# SILENT", "# OFFLINE"])

    def test_a_login_typed_at_a_silent_world_is_never_shown(self):
        rig, client, link = self.newcomer()
        rig.heard("silent")
        client.says("connect Alice secret\r\n")
        rig.down()
        self.assertNotIn(b"secret", client.read())
        rig.found("life 2")
        self.assertIn("connect Alice secret", rig.game.accept().lines())

    def test_quit_typed_at_a_silent_world_leaves(self):
        for when in ("before", "after"):
            for login in (False, True):
                with self.subTest(when=when, login=login):
                    rig = self.rig()
                    client = rig.player()[0] if login else rig.client()
                    link = rig.game.peers[-1] if login else rig.game.accept()
                    if when == "after":
                        rig.heard("silent")
                    client.says("QUIT\r\n")
                    if when == "before":
                        rig.pass_time(15)
                        rig.heard("silent")
                    self.assertIn("QUIT", link.lines())
                    client.read()
                    self.assertEqual((state_of(client), client.ended), ("CLOSING", True))

    def test_quit_typed_before_the_link_is_open_leaves(self):
        rig = self.rig(up=False)
        rig.found("life 1", rig.full)
        rig.heard("silent")
        client = rig.client()
        client.says("hello\r\nquit\r\n")
        self.assertEqual(state_of(client), "CLOSING")

    def test_each_silence_is_told_once(self):
        rig, client, _ = self.player()
        for _ in range(2):
            rig.heard("silent")
            client.says("one\r\n")
            client.says("two\r\n")
            self.assertEqual(client.lines(), ["# SILENT"])
            rig.heard("answering")

    def test_a_link_that_ends_during_the_silence(self):
        rig, client, link = self.player()
        rig.heard("silent")
        link.hangs_up()
        self.assertEqual((state_of(client), client.lines()), ("ASKING", ["# SILENT"]))


class Returning(RigCase):
    def test_on_success_only_the_online_notice(self):
        rig, client, link = self.returning()
        rig.let_in(link, "Welcome, Alice!\r\nLimbo")
        self.assertEqual((state_of(client), client.lines()), ("PLAYING", ["# ONLINE"]))

    def test_kept_lines_go_one_at_a_time(self):
        rig, client, link = self.returning()
        client.says("one\r\ntwo\r\nthree\r\nfour\r\n")
        rig.let_in(link)
        self.assertEqual(link.lines(), ["one"])
        link.says("answer\r\n")
        self.assertEqual(link.lines(), ["two"])
        rig.pass_time(0.05)
        self.assertEqual(link.lines(), [])
        rig.pass_time(0.06)
        self.assertEqual(link.lines(), ["three"])
        rig.pass_time(0.11)
        self.assertEqual(link.lines(), ["four"])
        client.says("five\r\n")
        self.assertEqual(link.lines(), ["five"])

    def test_an_answer_does_not_shorten_the_next_100_ms(self):
        rig, client, link = self.returning()
        client.says("one\r\ntwo\r\nthree\r\nfour\r\n")
        rig.let_in(link)
        link.read()
        rig.pass_time(0.09)
        link.says("answer\r\n")
        before = link.lines()
        # the timer of the line before that answer
        rig.pass_time(0.02)
        self.assertEqual((len(before), link.lines()), (1, []))

    def test_typing_on_does_not_stop_the_kept_lines(self):
        rig, client, link = self.returning()
        client.says("one\r\ntwo\r\nthree\r\n")
        rig.let_in(link)
        sent = link.lines()
        rig.pass_time(0.05)
        client.send("four\r\n")
        rig.pass_time(*[0.06] * 20)                             # the world says nothing
        self.assertEqual(sent + link.lines(), ["one", "two", "three", "four"])

    def test_last_words_are_shown_of_a_world_that_lives_on_only(self):
        """One that dies in the middle of a return has sent banner, news and room: nobody's last
        words."""
        for lives_on, took in itertools.product((True, False), repeat=2):
            with self.subTest(lives_on=lives_on, took=took):
                rig, client, link = self.returning()
                mark = nonce_of(rig, client) + b"\r\n" if took else b""
                link.says(b"The game is full.\r\n" + mark)
                link.hangs_up()
                self.assertEqual(client.lines(), [])
                if lives_on:
                    rig.pass_time(1.1)
                else:
                    rig.restart("life 3")
                rig.game.accept()
                self.assertEqual(client.lines(), ["The game is full."]
                                 if lives_on and not took else [])

    def test_guests_and_new_characters_are_not_checked_first(self):
        """They have no password, or are not there yet: the heartbeat would find them wrong."""
        for typed in ("connect guest", "create Zed zedpw", "connect Alice pw"):
            with self.subTest(typed):
                rig, client, _ = self.newcomer(family="pennmush")
                rig.down()
                client.says(typed + "\r\n")
                rig.found("life 2", checks=True)
                self.assertEqual(len(rig.beat.checks), typed == "connect Alice pw")
                if not rig.beat.checks:
                    self.assertIn(typed, rig.game.accept().lines())

    def test_a_guest_that_the_world_hung_up_on_gets_the_login_screen(self):
        rig, client, _ = self.newcomer(family="pennmush")
        rig.down()
        client.says("connect guest\r\n")
        rig.found("life 2")
        link = rig.game.accept()
        link.send("Guest connections not allowed.\r\n")
        link.hangs_up()
        rig.pass_time(1.1)
        self.assertEqual((state_of(client), rig.game.accept().lines()), ("LOGIN", []))
        self.assertIn("Guest connections not allowed.", client.lines())

    def test_offline_is_said_once_to_one_whose_links_fail(self):
        rig = self.rig(up=False)
        rig.found("life 1", rig.full)
        client = rig.client()
        rig.pass_time(*[2] * 10)
        rig.down()
        self.assertEqual(client.lines(), ["# OFFLINE"])
        rig.found("life 2")
        rig.game.accept()
        self.assertEqual((state_of(client), client.lines()), ("LOGIN", ["# ONLINE"]))

    def test_offline_is_said_once(self):
        """Also to one at the login screen whose new link was not open yet when the world died
        again."""
        rig, client, _ = self.newcomer()
        rig.restart("life 2", rig.full)
        self.assertEqual(state_of(client), "OPENING")
        rig.down()
        self.assertEqual((state_of(client), client.lines()), ("WAITING", ["# OFFLINE"]))
        rig.found("life 3")
        self.assertEqual(client.lines(), ["# ONLINE"])
        rig.down()
        self.assertEqual(client.lines(), ["# OFFLINE"])

    def test_each_outage_is_told(self):
        rig, client, _ = self.player()
        for life in ("life 2", "life 3"):
            rig.restart(life)
            rig.let_in(rig.game.accept())
            self.assertEqual((state_of(client), client.lines()),
                             ("PLAYING", ["# OFFLINE", "# ONLINE"]))

    def test_last_words_are_shown_once(self):
        rig, client, link = self.returning()
        for seconds in (1, 2, 4, 8):
            link.send("The game is full.\r\n")
            link.hangs_up()
            rig.pass_time(seconds + 0.1)
            link = rig.game.accept()
        self.assertEqual((state_of(client), client.lines()), ("RETURNING", ["The game is full."]))

    def test_a_session_waits_for_another_of_its_character_whose_pairs_are_being_checked(self):
        """Else it would show the other's login text. Told at last that all its pairs are wrong, it
        keeps nobody waiting."""
        for verdicts in ([True, False], [False, False]):
            rig = self.rig()
            rig.family = type("Choosy", (type(rig.family),), {"counts_failures": True})()
            rig.found("life 1", checks=True)
            first, second = rig.player("Alice")[0], rig.player("Alice")[0]
            for client in (first, second):
                client.session.character.previous = has.Credentials(b"connect", b"Alice", b"old")
            rig.restart("life 2", checks=True)
            (number, serial, _), (other, other_serial, _) = rig.beat.checks
            rig.post(rig.hub.on_checked, number, serial, [True, False])
            link = rig.game.accept()
            rig.let_in(link)
            self.assertEqual([state_of(first), state_of(second)], ["RETURNING", "WAITING"])
            rig.post(rig.hub.on_checked, other, other_serial, verdicts)
            if verdicts[0]:
                rig.let_in(rig.game.accept())
            link.says("the login text of the other\r\n### Begin INFO\r\n### End INFO\r\n")
            self.assertEqual(state_of(first), "PLAYING")
            self.assertNotIn(b"login text", first.read())

    def test_nobody_waits_for_one_who_ends(self):
        """TinyMUSH takes one at a time: a client that leaves in the middle of its return gives its
        turn away."""
        rig = self.rig()
        clients = [rig.player(name)[0] for name in ("Alice", "Bob", "Carol")]
        rig.down()
        rig.family = type("Slow", (type(rig.family),), {"at_once": 1})()
        rig.found("life 2")
        self.assertEqual([state_of(c) for c in clients], ["RETURNING", "WAITING", "WAITING"])
        clients[0].hangs_up()
        self.assertEqual([state_of(c) for c in clients], ["gone", "RETURNING", "WAITING"])


class TestSuspects(unittest.TestCase):
    """Who kills the world? Alone, in worlds that are made of numbers."""

    def setUp(self):
        has.Suspects.WINDOW = SUSPECT_SECONDS

    def test_who_came_long_ago_need_not_be_remembered(self):
        """outlived() changes nothing but the size."""
        rng = random.Random(7)
        for _ in range(60):
            both, now = (has.Suspects(), has.Suspects()), 0.0
            for _ in range(rng.randrange(2, 12)):
                for it in both:
                    it.found(now, set(range(9)))
                for _ in range(rng.randrange(20)):
                    now += rng.choice((0.1, 1, 4, 9))
                    who, typed = rng.randrange(9), rng.random() < 0.3
                    for it in both:
                        it.came(who, now, typed)
                    both[1].outlived(now)
                now += rng.choice((0.05, 1, 6))
                self.assertEqual(*[it.died(now) for it in both])
                self.assertEqual(*[(it.barred, it._strikes, it._streak) for it in both])
        for it in both:
            it.found(now, set())
            it.came(1, now + 1)
            it.outlived(now + 9)
            self.assertEqual(it._came, {})

    def lives(self, suspects, users, rng, rate, killer=None, after=0.0, most=80, start=0.0):
        """A world that dies at random, `rate` times a second, and `after` seconds behind the
        killer's coming; HAS brings all back as LinkQueue does. Returns (how often it died until
        somebody was barred, or None; who was)."""
        now = start
        for death in range(1, most + 1):
            suspects.found(now, set(users))
            dies_at = now + (rng.expovariate(rate) if rate else 1e9)
            order = [who for who in users if not suspects.is_suspect(who)]
            late = [who for who in users if suspects.is_suspect(who)]
            at, single = now, 0.001
            together, step = suspects.together, 0
            while (order or late) and at < dies_at:
                if not order:
                    at = max(at, at + suspects.wait(late[0], at))
                    order, late = late[:together], late[together:]
                    if at >= dies_at:
                        break
                who = order.pop(0)
                if who not in suspects.barred:
                    suspects.came(who, at)
                    if who == killer:
                        dies_at = min(dies_at, at + after)
                at += single
            now = max(dies_at, at) if dies_at < 1e9 else at + 100
            if dies_at >= 1e9:
                return None, suspects.barred
            if suspects.died(now):
                return death, suspects.barred
            now += 1
        return None, suspects.barred

    def test_who_kills_it_is_barred_after_few_deaths(self):
        for count in (1, 2, 5, 8):
            for after in (0.0, 0.01, 0.3, 1.0):
                with self.subTest(users=count, after=after):
                    suspects, users = has.Suspects(), [b"user %d" % n for n in range(count)]
                    suspects.found(0.0, {b"alice"})
                    suspects.came(users[-1], 86400.0, typed=True)
                    suspects.died(86400.0 + after)
                    deaths, barred = self.lives(suspects, users, random.Random(1),
                                                0, users[-1], after, start=86402.0)
                    self.assertEqual(barred, {users[-1]})
                    # the more slowly it kills, the more like chance it looks
                    self.assertLessEqual(1 + deaths, {0.3: 7, 1.0: 10}.get(after, 5)
                                         + 2 * (count > 4))
                    self.assertEqual(self.lives(suspects, users, random.Random(1),
                                                0, users[-1], after, start=87000.0)[0], None)

    def test_no_innocent_is_barred_in_worlds_that_die_at_random(self):
        """From the first second on, or after a day of calm."""
        for seed in [*range(40), secrets.randbelow(1 << 30)]:
            for mean, count, calm in itertools.product((1, 3, 8, 20, 60),
                                                       (1, 4, 15), (0.0, 86400.0)):
                with self.subTest(seed=seed, mean=mean, users=count, calm=calm):
                    suspects, users = has.Suspects(), [b"user %d" % n for n in range(count)]
                    suspects.found(0.0, set(users))
                    suspects.came(users[-1], calm, typed=True)
                    suspects.died(calm + 0.1)
                    barred = self.lives(suspects, users, random.Random(seed),
                                        1 / mean, most=40, start=calm + 1)[1]
                    self.assertEqual(barred, set())

    def test_strangers_who_were_near_a_death_are_forgotten(self):
        """Or there would be so many suspects that nobody came alone."""
        suspects, users = has.Suspects(), [b"alice", b"mallory"]
        suspects.found(0.0, set(users))
        for number in range(20):
            suspects.came(number, 86400.0)
        suspects.came(b"mallory", 86400.0, typed=True)
        suspects.died(86400.1)
        self.assertEqual(self.lives(suspects, users, random.Random(1),
                                    0, b"mallory", 0.01, start=86401.0)[1], {b"mallory"})

    def test_one_death_behind_returns_puts_nobody_off(self):
        suspects = has.Suspects()
        suspects.found(0.0, {b"alice"})
        suspects.came(b"alice", 100.0)
        suspects.died(101.0)
        self.assertFalse(suspects.is_suspect(b"alice"))

    def test_a_login_that_the_world_outlives_clears(self):
        suspects = has.Suspects()
        for start in (0.0, 10.0):
            suspects.found(start, {b"alice"})
            suspects.came(b"alice", start + 1)
            suspects.died(start + 2)
        self.assertTrue(suspects.is_suspect(b"alice"))
        suspects.found(20.0, {b"alice"})
        suspects.came(b"alice", 23.0)
        suspects.died(40.0)
        self.assertFalse(suspects.is_suspect(b"alice"))

    def test_what_is_remembered_is_bounded(self):
        suspects = has.Suspects()
        for number in range(500):
            suspects.found(number * 10.0, {number})
            suspects.came(number, number * 10.0 + 1)
            suspects.died(number * 10.0 + 2)
        self.assertLess(len(suspects._strikes), 5)
        self.assertLessEqual(len(suspects._deaths) + len(suspects._lives), 2 * 361)

    def test_nobody_waits_for_ever(self):
        suspects = has.Suspects()
        for start in (0.0, 10.0):
            suspects.found(start, {b"alice"})
            suspects.came(b"alice", start + 1)
            suspects.died(start + 2)
        suspects.found(20.0, {b"alice"})
        for second in range(20, 80):
            suspects.came(b"bob", float(second), typed=True)
            self.assertEqual(suspects.wait(b"alice", float(second)),
                             2.0 if second < 78 else 80.0 - second)
        self.assertEqual(suspects.wait(b"alice", 80.0), 0)


class SuspectsComeLast(RigCase):
    def test_one_by_one_when_all_others_are_through(self):
        rig = self.rig(suspicious=True)
        clients = [rig.player("Alice")[0]]
        rig.pass_time(600)
        clients += [rig.player(name)[0] for name in ("Bob", "Carol")]

        def states():
            return [state_of(client) for client in clients]
        rig.restart("life 2")
        # one death behind logins means nothing
        self.assertEqual(states(), ["RETURNING"] * 3)
        for _ in clients:
            rig.let_in(rig.game.accept())
        rig.pass_time(600)
        rig.down()
        rig.pass_time(600)
        rig.found("life 3")
        self.assertEqual(states(), ["RETURNING"] * 3)           # nor does one long after
        for _ in clients:
            rig.let_in(rig.game.accept())
        rig.restart("life 4")
        for _ in clients:
            rig.let_in(rig.game.accept())
        rig.down()                              # the second in a row just behind them
        clients.append(rig.client())
        rig.found("life 5")
        self.assertEqual(states(), ["WAITING"] * 3 + ["LOGIN"])
        rig.game.accept().says("Welcome\r\n")
        for count in range(1, 4):
            rig.pass_time(1.9)
            self.assertEqual(states().count("PLAYING"), count - 1)
            rig.pass_time(0.2)
            rig.let_in(rig.game.accept())
            self.assertEqual(states().count("PLAYING"), count)

    def test_what_is_known_of_them_goes_over_an_upgrade(self):
        rig, client, _ = self.player(suspicious=True)
        for life in ("life 2", "life 3"):
            rig.restart(life)
            if life == "life 2":
                rig.let_in(rig.game.accept())
        self.assertEqual(state_of(client), "WAITING")
        rig.upgrade()
        self.assertEqual(state_of(client), "WAITING")
        rig.pass_time(2.1)
        self.assertEqual(state_of(client), "RETURNING")

    def test_who_is_barred_gets_the_login_screen_and_a_notice(self):
        rig = self.rig(suspicious=True)
        (alice, _), (bob, _) = rig.player("Alice"), rig.player("Bob")
        rig.hub.links.suspects.barred.add(b"alice")
        rig.restart("life 2")
        self.assertEqual([state_of(client) for client in (alice, bob)], ["LOGIN", "RETURNING"])
        self.assertEqual((alice.lines(), alice.session.character.login),
                         (["# OFFLINE", "# SUSPECT"], None))

    def test_a_client_that_kills_it_from_the_login_screen_is_closed(self):
        rig = self.rig(suspicious=True)
        client = rig.client()
        rig.hub.links.suspects.barred.add(client.session.number)
        rig.restart("life 2")
        self.assertEqual((state_of(client), client.lines()),
                         ("CLOSING", ["# OFFLINE", "# SUSPECT"]))


class Pace(RigCase):
    """How fast users are brought back: resume_rate, or as the family takes it."""

    def test_resume_rate(self):
        """How many of 12 are on their way after each quarter of a second, while none of them is
        through."""
        for rate, at_once, wanted in (("auto", 64, [12, 12, 12, 12]), ("auto", 1, [1, 1, 1, 1]),
                                      (0, 1, [12, 12, 12, 12]), (4, 64, [1, 2, 3, 4]),
                                      (2, 64, [1, 1, 2, 2]), (4, 2, [1, 2, 2, 2])):
            with self.subTest(resume_rate=rate, at_once=at_once):
                rig = self.rig(resume_rate=rate)
                clients = [rig.pass_time(1) or rig.player(f"u{number}")[0] for number in range(12)]
                rig.down()
                rig.pass_time(1)                # newcomers are paced, too
                rig.family = type("Paced", (type(rig.family),), {"at_once": at_once})()
                rig.found("life 2")
                for count in wanted:            # the oldest first
                    self.assertEqual([state_of(c) for c in clients],
                                     ["RETURNING"] * count + ["WAITING"] * (12 - count))
                    rig.pass_time(0.25)

    def away(self, count, **family):
        """Users of a world that is down, and will come back with a family of such limits."""
        rig = self.rig()
        clients = [rig.player(f"u{number}")[0] for number in range(count)]
        rig.down()
        rig.family = type("Paced", (type(rig.family),), family)()
        rig.found("life 2")
        # Waiting, Returning, Playing
        return rig, lambda: "".join(state_of(client)[0] for client in clients)

    def knocks(self, rig):
        """How many connects to the world that nobody has accepted yet have been closed again."""
        count = 0
        while select.select([rig.game.sock], [], [], 0)[0]:
            peer = rig.game.accept()
            count += (peer.read(), peer.ended) == (b"", True)
        return count

    def test_a_world_that_may_have_forgotten_a_link_is_woken(self):
        for returning in (False, True):
            with self.subTest(returning=returning):
                rig = self.rig("pennmush")
                if returning:
                    clients = []
                    for name in ("Alice", "Bob"):
                        clients.append(rig.client())
                        clients[-1].session.character.login = has.Credentials(
                            b"connect", name.encode(), b"pw")
                    rig.pass_time(0.1)
                    for _ in clients:
                        rig.game.accept().send("Welcome\r\n")
                    rig.settle()
                    rig.restart("life 2")
                else:
                    clients = [rig.client(), rig.client()]
                rig.pass_time(0.1)
                served, mute = rig.game.accept(), rig.game.accept()
                served.says("Welcome\r\n")
                self.assertEqual(self.knocks(rig), 0)
                rig.pass_time(0.15)
                self.assertEqual(self.knocks(rig), 0)
                rig.pass_time(0.2)
                self.assertEqual(self.knocks(rig), 1)
                mute.says("Welcome\r\n")
                rig.pass_time(2.1, 2.1, 2.1)
                self.assertEqual(self.knocks(rig), 0)

    def test_it_is_not_woken_for_ever_nor_while_silent_nor_in_other_families(self):
        for family, silent, wanted in (("pennmush", False, len(has.WAKE_SECONDS)),
                                       ("pennmush", True, 0), ("tinymux", False, 0)):
            with self.subTest(family, silent=silent):
                rig = self.rig(family)
                rig.client()
                rig.settle()
                if silent:
                    rig.heard("silent")
                rig.pass_time(*[0.5] * 40)
                self.assertEqual(self.knocks(rig), wanted)
                rig.close()

    def test_the_watch_for_forgotten_links_goes_through_an_upgrade(self):
        rig = self.rig("pennmush")
        rig.client()
        rig.pass_time(0.2)
        rig.upgrade()
        rig.pass_time(0.4)
        self.assertEqual(self.knocks(rig), 1)

    def test_a_link_counts_until_its_first_byte(self):
        """It shows that the server has accepted it; the end of the login is another matter."""
        for most_silent in (0, 4):
            rig, states = self.away(3, at_once=1, most_silent=most_silent)
            for wanted in ("RWW", "RRW", "RRR"):
                self.assertEqual(states(), wanted)
                rig.game.accept().says("W")

    def test_a_first_byte_speaks_for_all_links_before_it(self):
        rig, states = self.away(6, at_once=3)
        links = [rig.game.accept() for _ in range(3)]
        self.assertEqual(states(), "RRRWWW")
        links[1].says("W")
        self.assertEqual(states(), "RRRRRW")
        links[0].says("W")
        self.assertEqual(states(), "RRRRRW")

    def test_a_silent_link_holds_up_the_next_for_a_moment_only(self):
        """The server looks a name up; but no more links are silent than its backlog holds."""
        rig, states = self.away(8, at_once=1, most_silent=4)
        for wanted in ("RWWWWWWW", "RRWWWWWW", "RRRWWWWW", "RRRRWWWW", "RRRRWWWW", "RRRRWWWW"):
            self.assertEqual(states(), wanted)
            rig.pass_time(0.03, 0.021)
        [rig.game.accept() for _ in range(3)][2].says("W")      # three of them were accepted
        self.assertEqual(states(), "RRRRRWWW")

    def test_a_world_that_answers_the_heartbeat_has_accepted_what_is_silent(self):
        """Whatever look-ups are lost, nobody behind waits for them."""
        rig, states = self.away(9, at_once=1, most_silent=4)
        for wanted in ("RRRRWWWWW", "RRRRRRRRW"):
            rig.pass_time(*[0.06] * 5)
            self.assertEqual((states(), rig.beat.asks), (wanted, [(has.NOBODY, 0)]))
            rig.pass_time(1)                    # a frozen one meets four
            self.assertEqual((states(), rig.beat.asks), (wanted, [(has.NOBODY, 0)]))
            rig.answer()
        self.assertEqual(states(), "RRRRRRRRR")

    def test_sessions_of_one_character_come_one_after_another_where_they_must(self):
        rig = self.rig("tinymush")
        clients = [rig.client() for _ in range(2)]
        for client in clients:
            client.session.character.login = has.Credentials(b"connect", b"Alice", b"pw")
        rig.restart("life 2")
        rig.game.accept().send("Welcome\r\n")
        rig.pass_time(1)
        self.assertEqual([state_of(client) for client in clients], ["RETURNING", "WAITING"])


class NewConnections(RigCase):
    """What the world and the kernel are told of them."""

    def test_the_time_of_the_connect_is_told_if_wanted(self):
        for wanted, line in (("yes", r"@remotehostname 203\.0\.113\.9=\d{10}"),
                             ("no", r"@remotehostname 203\.0\.113\.9")):
            rig = self.rig("teenymush", add_epoch_time=wanted)
            rig.client()
            self.assertRegex(rig.game.accept().lines()[0], line + r"\Z")

    @unittest.skipUnless(hasattr(socket, "TCP_KEEPIDLE"),
                         "this platform names these options otherwise")
    def test_vanished_peers_are_noticed(self):
        rig = self.rig(dead_after=33)
        rig.hub.door.listen()
        with socket.create_connection(rig.hub.door.listeners[0].sock.getsockname()):
            rig.settle(lambda: rig.hub.sessions)
            (session,) = rig.hub.sessions.values()
            rig.game.accept()
            rig.settle(lambda: not session.link.connecting)
            for stream, wanted in ((session.client, (60, 15, 5)), (session.link, (15, 5, 3))):
                self.assertTrue(stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
                self.assertEqual(tuple(stream.sock.getsockopt(socket.IPPROTO_TCP, option)
                                       for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)), wanted)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                self.assertEqual(session.link.sock.getsockopt(socket.IPPROTO_TCP,
                                                              socket.TCP_USER_TIMEOUT), 43000)


SETTLED = [0.1] * 4                # until a new client's negotiation is awaited no more


class ReattachCase(RigCase):
    """What the tests of kept places need."""

    def rig(self, *arguments, **settings):
        return super().rig(*arguments, **{"reattach": 300, **settings})

    def comes_back(self, rig, line="connect Alice pw\r\n", **how):
        """Another client logs in: the client, and the world's end of the link that it had."""
        client, own = rig.newcomer(**how)
        client.says(line)
        rig.pass_time(*SETTLED)
        return client, own

    def away(self, rig, name="Alice", **how):
        """Somebody whose line has dropped: (his client, the world's end of the link)."""
        client, link = rig.player(name, **how)
        client.hangs_up()
        self.assertTrue(client.session.place.away_at)
        return client, link


class Reattach(ReattachCase):
    """A user's own line drops: his place is kept, and he comes back into it."""

    def test_every_way_to_lose_a_line(self):
        for name, lose in (("FIN", lambda client: client.sock.close()),
                           ("RST", lambda client: client.reset()),
                           ("half", lambda client: client.sock.shutdown(socket.SHUT_WR))):
            with self.subTest(name):
                rig, client, link = self.player(tcp=True)
                session = client.session
                client.says("say last words\r\nhalf a li")
                lose(client)
                rig.settle()
                self.assertEqual(link.read(), b"say last words\r\nhalf a li" + b"\b" * 9)
                self.assertEqual(session.status()["state"], "AWAY")
                link.send("Bob says, \"you there?\"\r\n")
                rig.pass_time(192)
                again, own = self.comes_back(rig, tcp=True)
                self.assertIn(session.number, rig.hub.sessions)
                self.assertEqual(len(rig.hub.sessions), 1)
                text = again.lines()
                self.assertRegex(text[0], r"# NOTICE # Welcome back: your place was kept for 3m "
                                          r"12s\.")
                self.assertRegex(text[-3], r"You missed 1 line\(s\):\Z")
                self.assertEqual("# NOTICE # Perhaps you saw these:" in text, name == "RST")
                self.assertEqual(text[-2:], ['Bob says, "you there?"',
                                             "# NOTICE # That is all. You are back."])
                self.assertEqual((own.read(), own.ended), (b"", True))
                again.send("say here\r\n")
                link.says("hello\r\n")
                self.assertEqual((link.read(), again.lines()), (b"say here\r\n", ["hello"]))
                check_consistent(self, rig)

    def test_who_leaves_is_let_go(self):
        rig = self.rig()
        for words in ("QUIT\r\n", ""):
            client, link = rig.player()
            client.send(words)
            if not words:
                rig.hub.settings = settings_of((("reattach", 0),))
            client.hangs_up()
            self.assertEqual(link.read(), words.encode())
            self.assertTrue(link.ended or client.session.state.name == "CLOSING")

    def test_guests_and_who_is_not_logged_in_have_no_place(self):
        rig, client, _ = self.newcomer()
        client.hangs_up()
        for name in ("guest", "Visitor"):       # many worlds have guests by other names
            client, link = rig.newcomer()
            client.says(f"connect {name}\r\n")
            rig.let_in(link)
            self.assertEqual(state_of(client), "PLAYING")
            client.hangs_up()
        self.assertFalse(rig.hub.places)

    def test_what_opens_a_place(self):
        for line, opens in (("con *aLiCe pw", True), ('connect "Alice" pw', True),
                            ("co alice pw", True), ("connect Alice Pw", False),
                            ("connect Alice wrong", False), ("cd Alice pw", False),
                            ("connect Alicia pw", False), ("create Alice pw", False),
                            ("connect Alice", False)):
            with self.subTest(line):
                rig, client, link = self.player()
                client.hangs_up()
                again, own = self.comes_back(rig, line + "\r\n")
                self.assertEqual(bool(client.session.place.away_at), not opens)
                self.assertEqual(b"Welcome back" in again.read(), opens)
                if opens:
                    self.assertEqual(own.read(), b"")
                else:
                    self.assertIn(line.split()[-1].encode(), own.read())

    def test_text_behind_the_login_follows(self):
        rig, client, link = self.player()
        client.hangs_up()
        for pieces in (["connect Alice pw\r\nsay at once\r\n"],
                       ["conn", "ect Alice p", "w\r\nsay at", " once\r\n"]):
            again, own = rig.newcomer()
            for piece in pieces:
                again.says(piece)
            rig.pass_time(*SETTLED)
            self.assertEqual((link.read(), own.read()), (b"say at once\r\n", b""))
            self.assertIn(b"Welcome back", again.read())
            again.hangs_up()

    def test_the_time_is_over(self):
        rig, client, link = self.player(reattach=60)
        client.hangs_up()
        # the clock on the wall is only for showing
        with mock.patch.object(has.time, "time", lambda: 5e9):
            rig.pass_time(*[10] * 5, 9)
        self.assertFalse(link.read() or link.ended)
        rig.hub.settings = settings_of((("reattach", 59),))     # a HUP
        rig.hub.places.look()
        rig.settle()
        link.read()
        self.assertTrue(link.ended)
        self.assertFalse(rig.hub.sessions or rig.hub.places)

    def test_the_world_dies_meanwhile(self):
        rig, client, link = self.player()
        client.hangs_up()
        rig.down()
        again = rig.client()
        again.send("connect Alice pw\r\n")
        rig.pass_time(0.1)
        self.assertEqual(state_of(client), "WAITING")
        self.assertEqual(again.lines()[-2:], ["# OFFLINE", "# NOTICE # That is all. You are back."])
        rig.found("life 2")
        rig.let_in(rig.game.accept())
        self.assertEqual((state_of(client), again.lines()[:1]), ("PLAYING", ["# ONLINE"]))

    def test_booted_meanwhile(self):
        rig, client, link = self.player()
        client.hangs_up()
        link.send("Go away.\r\n")
        link.hangs_up()
        rig.answer([(client.session.number, client.session.serial)], client.session.life)
        self.assertFalse(rig.hub.sessions or rig.hub.places)

    def test_two_windows(self):
        """Both lost: the older place first; a third login is one more link."""
        rig = self.rig()
        (first, link), (second, other) = rig.player(), rig.player()
        for client in (first, second):
            client.hangs_up()
        for wanted in (first, second):
            again, own = self.comes_back(rig)
            self.assertFalse(wanted.session.place.away_at)
        third, own = self.comes_back(rig)
        self.assertIn(b"connect Alice pw", own.read())

    def test_an_evicted_thief(self):
        """Rule A: the character logs in with another password, so the place is not its owner's."""
        rig, thief, link = self.player()
        thief.hangs_up()
        owner, own = rig.newcomer()
        owner.says("connect Alice new\r\n")
        rig.let_in(own)
        self.assertFalse(rig.hub.places)
        link.read()
        self.assertTrue(link.ended)

    def test_the_heartbeat_is_asked_about_the_password(self):
        """Rule B, where the world has such a check: an old password is for the world to refuse."""
        for verdict in (True, False, None):
            rig = self.rig("teenymush", up=False)
            client = rig.client()
            rig.found("life 1", checks=True)
            link = rig.game.accept()
            client.says("connect Alice pw\r\n")
            link.says("Last connect was from home\r\n")
            client.session.character.checked = None
            self.assertEqual(state_of(client), "PLAYING")
            client.hangs_up()
            again, own = self.comes_back(rig)
            self.assertTrue(client.session.place.away_at)
            rig.post(rig.hub.on_checked, again.session.number, again.session.serial, [verdict])
            rig.pass_time(*SETTLED)
            self.assertEqual(bool(client.session.place.away_at), verdict is False)
            self.assertEqual(b"connect Alice pw" in own.read(), verdict is False)

    def test_a_changed_password_is_that_of_all_his_sessions(self):
        rig = self.rig()
        (first, link), (second, other) = rig.player(), rig.player()
        first.hangs_up()
        second.says("@password pw=new\r\n")
        other.says("Password changed.\r\n")
        again, own = self.comes_back(rig, "connect Alice pw\r\n")
        self.assertTrue(first.session.place.away_at)
        again, own = self.comes_back(rig, "connect Alice new\r\n")
        self.assertFalse(first.session.place.away_at)

    def test_an_upgrade_keeps_places(self):
        rig, client, link = self.player()
        client.hangs_up()
        link.says("before\r\n")
        rig.upgrade()
        link.says("behind\r\n")
        again, own = self.comes_back(rig)
        self.assertEqual(again.lines()[-3:-1], ["before", "behind"])
        again.hangs_up()
        self.assertEqual(len(rig.hub.places), 1)

    def test_half_open(self):
        """Somebody with the right password, and a client that may be dead: its kernel is asked."""
        for answers in (True, False):
            rig, client, link = self.player(tcp=True)
            with mock.patch.object(has, "acknowledged_ago", lambda sock: 0
                                   if answers else math.inf), \
                    mock.patch.object(has, "can_tell_life", lambda sock: True):
                again, own = rig.newcomer(tcp=True)
                again.says("connect Alice pw\r\n")
                self.assertEqual(own.read(), b"")
                rig.pass_time(*[0.03] * (3 if answers else 90), *SETTLED)
            self.assertEqual(b"connect Alice pw" in own.read(), answers)
            self.assertEqual(b"Welcome back" in again.read(), not answers)
            client.read()
            self.assertEqual(client.ended, not answers)

    def test_a_living_client_on_this_machine_acknowledges(self):
        rig, client, link = self.player(tcp=True)
        sock = client.session.client.sock
        if not has.can_tell_life(sock):
            self.skipTest("this platform does not say when a peer has acknowledged")
        has.tune(sock, 1, 1, 5)
        until = time.monotonic() + 5
        while has.acknowledged_ago(sock) > 0.5 and time.monotonic() < until:
            select.select([], [], [], 0.02)
        self.assertLess(has.acknowledged_ago(sock), 0.5)

    def test_limits(self):
        rig, client, link = self.player(max_clients=1)
        client.hangs_up()
        other, _ = rig.player("Bob")                            # a place counts as no client
        self.assertEqual(state_of(other), "PLAYING")
        other.hangs_up()
        # the oldest went
        self.assertEqual(list(rig.hub.places.sessions), [other.session.number])

    def test_nobody_crowds_out_the_others(self):
        """... by many characters of his own whose lines drop: an address has as many places as
        clients."""
        rig = self.rig(max_per_host=2, max_clients=9)
        alice, link = self.away(rig)
        for number in range(5):
            self.away(rig, f"User{number}", host="203.0.113.66")
        self.assertEqual(sorted(has.printable(it.character.login.name)
                                for it in rig.hub.places.sessions.values()),
                         ["Alice", "User3", "User4"])
        for number in (3, 4):
            again, own = self.comes_back(rig, f"connect User{number} pw\r\n", host="2001:db8::1")
            again.hangs_up()
        again, own = self.comes_back(rig)
        self.assertIn(b"Welcome back", again.read())
        rig.pass_time(*[10] * 31)
        self.assertFalse(rig.hub.places or rig.hub.places._hosts)

    def test_memory_of_all_places_is_bounded(self):
        rig = self.rig(reattach_limit=1 << 16)
        rig.hub.places.MOST_BYTES = 1 << 18
        links = []
        for number in range(20):
            client, link = rig.player(f"User{number}")
            client.hangs_up()
            links.append(link)
        for _ in range(4):
            for link in links:
                link.says(b"x" * 70 + b"\r\n" * 1 + b"y" * 9000 + b"\r\n")
        kept = sum(len(session.client.out) for session in rig.hub.sessions.values())
        self.assertEqual(kept, rig.hub.places._bytes)
        self.assertLess(kept, (1 << 18) + (1 << 16))

    def test_what_was_lost_is_told(self):
        rig, client, link = self.player(reattach_limit=4096)
        client.hangs_up()
        for number in range(1000):
            link.send(b"line %03d\r\n" % number)
        rig.settle()
        again, own = self.comes_back(rig)
        text = again.read().decode()
        shown = re.findall(r"(?m)^line (\d+)\r$", text)
        told = re.search(r"the first (\d+) line\(s\) are lost\.\r\n"
                         r"# NOTICE # You missed (\d+) line\(s\):", text)
        self.assertEqual(int(told.group(2)), len(shown))
        self.assertEqual(int(told.group(1)) + int(told.group(2)), 1000)
        self.assertEqual(shown, [f"{number:03}" for number in range(1000)][-len(shown):])

    def test_status_kick_notice_and_stop(self):
        rig, client, link = self.player()
        client.hangs_up()
        rig.hub.control.command({"do": "notice", "text": "to all"}, None)
        status, = rig.status()["sessions"]
        self.assertEqual((status["state"], status["away"]), ("AWAY", 0))
        rig.pass_time(9)
        row = has.status_lines(rig.status())[-1]
        self.assertRegex(row, r"203\.0\.113\.9 +AWAY +\w+ +9s ")
        rig.hub.control.command({"do": "kick", "who": client.session.number}, None)
        self.assertFalse(rig.hub.sessions or rig.hub.places)

    def test_a_login_typed_for_a_refused_link(self):
        """The game is full: his place waits all the same."""
        rig, client, link = self.player()
        client.hangs_up()
        rig.found("life 1", rig.full)
        again = rig.client()
        again.says("connect Alice pw\r\nsay hi\r\n")
        rig.pass_time(10.1, 0.1)
        self.assertFalse(client.session.place.away_at)
        self.assertEqual(link.read(), b"say hi\r\n")

    def test_one_who_comes_and_goes(self):
        """A client that connects again every 0.3 s for a minute."""
        rig, client, link = self.player()
        taken = 0
        for _ in range(200):
            client.sock.close()
            rig.pass_time(0.1)
            client, own = rig.newcomer()
            own.send("Welcome!\r\n")
            client.send("connect Alice pw\r\n")
            rig.pass_time(0.1, 0.1)
            taken += b"Welcome back" in client.read()
            own.sock.close()
        rig.pass_time(*[0.1] * 15)
        self.assertGreater(taken, 50)                           # five at once, then one a second
        self.assertEqual(len(rig.hub.sessions), 1)
        self.assertEqual(link.read(), b"")
        self.assertFalse(link.ended)

    def test_off_by_default(self):
        rig, client, link = self.player(reattach=0)
        self.assertIs(type(client.session.client), has.Stream)
        self.assertIsNone(client.session.client.trail)
        client.hangs_up()
        link.read()
        self.assertTrue(link.ended)


class WhosePlace(ReattachCase):
    """Nobody without the right password gets a place, or learns of one."""

    def test_trying_passwords_at_a_place_is_braked(self):
        """... by one connection each, too; the right one is not even looked at before its time."""
        rig = self.rig()
        client, link = self.away(rig)
        for number in range(3):
            guesser, own = self.comes_back(rig, f"connect Alice guess{number}\r\n",
                                           host="203.0.113.66")
            self.assertIn(b"guess", own.read())
            guesser.hangs_up()
        guesser, own = self.comes_back(rig, host="203.0.113.66")
        self.assertTrue(client.session.place.away_at)
        self.assertEqual(own.read(), b"")
        self.assertTrue(any("Too many logins" in line for line in guesser.lines()))
        rig.pass_time(3.1, *SETTLED)
        self.assertFalse(client.session.place.away_at)

    def test_trying_them_while_the_world_is_down(self):
        rig = self.rig()
        client, link = self.away(rig)
        rig.down()
        guesser = rig.client(host="203.0.113.66")
        guesser.says("".join(f"connect Alice {word}\r\n" for word in ("one", "two", "three", "pw")))
        rig.pass_time(*SETTLED)
        self.assertTrue(client.session.place.away_at)
        self.assertEqual(guesser.lines()[-1], RARE_NOTICES["login_kept_notice"])

    def test_the_right_password_is_no_try(self):
        rig = self.rig()
        client, link = self.away(rig)
        # its client leaves sooner than it is served
        for _ in range(9):
            again, _ = rig.newcomer()
            again.says("connect Alice pw\r\n")
            again.hangs_up()
        again, own = self.comes_back(rig)
        self.assertIn(b"Welcome back", again.read())

    def test_the_password_reaches_no_link(self):
        rig = self.rig()
        client, link = self.away(rig)
        link.read()
        for pieces in (["connect Alice ", "pw\r\n"], list("connect Alice pw\r\n")):
            again, own = rig.newcomer()
            for piece in pieces:
                again.says(piece)
            rig.pass_time(*SETTLED)
            self.assertIn(b"Welcome back", again.read())
            self.assertEqual((link.read(), own.read()), (b"", b""))
            again.hangs_up()

    def test_the_old_password_after_a_change_in_another_session(self):
        """His sessions may spell his name in other ways."""
        rig, first, link = self.player("alice")
        second, other = rig.player('"*Alice"')
        first.hangs_up()
        second.says("@password pw=new\r\n")
        other.says("Password changed.\r\n")
        again, own = self.comes_back(rig)
        self.assertTrue(first.session.place.away_at)
        self.assertIn(b"connect Alice pw", own.read())
        again, own = self.comes_back(rig, "connect ALICE new\r\n")
        self.assertFalse(first.session.place.away_at)

    def test_an_evicted_thief_who_is_still_connected(self):
        """His client lives when the owner logs in with another password; it may drop, or be
        dead."""
        for drops in (True, False):
            rig, thief, link = self.player(tcp=True)
            owner, own = rig.newcomer()
            owner.says("connect Alice new\r\n")
            rig.let_in(own)
            if drops:
                thief.hangs_up()
                self.assertFalse(rig.hub.places)
            with mock.patch.object(has, "acknowledged_ago", lambda sock: math.inf):
                again, own = self.comes_back(rig)
                rig.pass_time(*[0.1] * 30)
            self.assertIn(b"connect Alice pw", own.read())
            self.assertNotIn(b"Welcome back", again.read())

    def test_nobody_gives_up_the_place_of_another_by_a_pretended_change(self):
        """Anybody can have himself shown that he has changed his name, or his password."""
        rig = self.rig()
        alice, _ = self.away(rig)
        alice.session.character.login.password = b"secret"
        mallory, link = rig.player("Mallory")
        for typed, shown in (("@name me=Alice", "Name set."),
                             ("@password pw=x", "Password changed.")):
            mallory.says(typed + "\r\n")
            link.says(shown + "\r\n")
        self.assertEqual(mallory.session.character.login.character, b"alice")
        self.assertTrue(alice.session.place.away_at)
        again, own = self.comes_back(rig, "connect Alice secret\r\n")
        self.assertIn(b"Welcome back", again.read())

    def test_the_address_is_named_where_it_changed(self):
        rig = self.rig()
        client, link = self.away(rig, host="203.0.113.1")
        with self.assertLogs(has.log, "INFO") as logged:
            again, own = self.comes_back(rig, host="203.0.113.2")
        self.assertIn("Your line was lost at 203.0.113.1; you are back from 203.0.113.2.",
                      again.read().decode())
        self.assertTrue(any("Alice@203.0.113.1: is back from 203.0.113.2 after"
                            in line for line in logged.output))
        self.assertEqual(rig.status()["sessions"][0]["host"], "203.0.113.2")

    def checked(self, rig, link, again):
        """A place that waits for the heartbeat's answer."""
        return rig.hub.on_checked, again.session.number, again.session.serial

    def away_where_passwords_are_checked(self):
        rig = self.rig("teenymush", up=False)
        client = rig.client()
        rig.found("life 1", checks=True)
        link = rig.game.accept()
        client.says("connect Alice pw\r\n")
        link.says("Last connect was from home\r\n")
        client.session.character.checked = None
        client.hangs_up()
        return rig, client, link

    def test_a_link_that_ends_while_the_password_is_checked(self):
        """The game is full, or his site is forbidden: his place is open all the same; else he
        leaves."""
        for right in (True, False):
            rig, client, link = self.away_where_passwords_are_checked()
            again, own = self.comes_back(rig)
            own.send("Sorry, full.\r\n")
            own.hangs_up()
            rig.answer([(again.session.number, again.session.serial)], again.session.life)
            self.assertFalse(is_gone(again))
            rig.post(rig.hub.on_checked, again.session.number, again.session.serial, [right])
            rig.pass_time(*SETTLED)
            self.assertEqual(bool(client.session.place.away_at), not right)
            text = again.read()
            self.assertEqual((b"Welcome back" in text, again.ended), (right, not right))

    def test_the_heartbeat_does_not_answer(self):
        rig, client, link = self.away_where_passwords_are_checked()
        again, own = self.comes_back(rig)
        rig.pass_time(2.1, *SETTLED)
        self.assertFalse(client.session.place.away_at)

    def test_the_world_dies_while_the_password_is_checked(self):
        rig, client, link = self.away_where_passwords_are_checked()
        again, own = self.comes_back(rig)
        rig.down()
        rig.pass_time(2.1, *SETTLED)
        self.assertFalse(client.session.place.away_at)
        self.assertEqual((state_of(client), is_gone(again)), ("WAITING", True))

    def test_a_place_that_is_given_up_meanwhile(self):
        """The login is kept for the world, as if nothing had been."""
        rig = self.rig()
        client, link = self.away(rig)
        rig.down()
        again = rig.client()
        again.send("connect Alice pw\r\nsay hi\r\n")
        with mock.patch.object(has.Place, "is_busy", True):
            rig.settle()
        client.session.place.give_up("for a test")
        rig.pass_time(*SETTLED)
        self.assertEqual(again.lines()[-2:], [RARE_NOTICES["login_kept_notice"], "# UNSENT say hi"])
        rig.found("life 2")
        self.assertIn(b"connect Alice pw", rig.game.accept().read())

    def test_another_place_where_somebody_was_faster(self):
        rig = self.rig()
        (first, link), (second, other) = rig.player(), rig.player()
        first.hangs_up()
        second.hangs_up()
        newcomers = [rig.client() for _ in range(3)]
        links = [rig.game.accept() for _ in range(3)]
        for client in newcomers:
            client.send("connect Alice pw\r\n")
        rig.settle()
        rig.pass_time(*SETTLED * 2)
        self.assertFalse(rig.hub.places)
        self.assertEqual(sum(b"connect Alice pw" in it.read() for it in links), 1)
        self.assertEqual(sum(b"Welcome back" in it.read() for it in newcomers), 2)


class LivingClients(ReattachCase):
    """Whether a client lives is asked of its kernel; who lives is never thrown out."""

    def setUp(self):
        self.dead = set()                                       # their clients do not acknowledge
        for name, stand_in in (("acknowledged_ago", lambda sock: math.inf
                                if sock in self.dead else 0),
                               ("can_tell_life", lambda sock: sock is not None)):
            patched(self, mock.patch.object(has, name, stand_in))

    def logs_in(self, rig):
        again, own = rig.newcomer(tcp=True)
        again.says("connect Alice pw\r\n")
        return again, own

    def keepalive(self, client):
        sock = client.session.client.sock
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), sock.getsockopt(
            socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)

    def test_one_lives_and_one_is_dead(self):
        rig = self.rig()
        with mock.patch.object(has, "can_tell_life", lambda sock: False):
            (living, link), (dead, other) = rig.player(tcp=True), rig.player(tcp=True)
        self.dead.add(dead.session.client.sock)
        again, own = self.logs_in(rig)
        rig.pass_time(*[0.1] * 26, *SETTLED)
        self.assertIn(b"Welcome back", again.read())
        other.says("to the dead one\r\n")
        self.assertEqual((again.lines(), living.read(), own.read()),
                         (["to the dead one"], b"", b""))

    def test_one_has_left_and_that_is_not_read_yet(self):
        """His kernel still acknowledges."""
        rig, client, link = self.player(tcp=True)
        stream = client.session.client
        stream.pause()                          # it is busy with what stands before
        client.sock.close()
        again, own = self.logs_in(rig)
        rig.pass_time(*[0.1] * 5)
        stream.resume()
        rig.pass_time(*SETTLED)
        self.assertIn(b"Welcome back", again.read())
        self.assertEqual(len(rig.hub.sessions), 1)

    def test_what_he_is_told_at_the_end_is_not_shown_again(self):
        rig, client, link = self.player(tcp=True)
        self.dead.add(client.session.client.sock)
        again, own = self.logs_in(rig)
        rig.pass_time(*[0.1] * 26, *SETTLED)
        self.assertIn(b"Your session goes on at 203.0.113.9.", client.read())
        self.assertNotIn(b"goes on at", again.read())

    def test_the_world_dies_meanwhile(self):
        """... and whoever comes while it is down is no second one, either."""
        for before in (True, False):
            rig, client, link = self.player(tcp=True)
            self.dead.add(client.session.client.sock)
            if before:
                rig.down()
                again = rig.client(tcp=True)
                again.says("connect Alice pw\r\n")
            else:
                again, own = self.logs_in(rig)
                rig.down()
            rig.pass_time(*[0.1] * 26, *SETTLED)
            self.assertEqual((state_of(client), is_gone(again)), ("WAITING", True))
            self.assertIn(b"Welcome back", again.read())

    @unittest.skipUnless(hasattr(socket, "TCP_KEEPIDLE"),
                         "this platform does not tell its keepalive")
    def test_the_keepalive_is_as_before_whatever_happens(self):
        for what in ("it lives", "he leaves", "the world dies", "kicked"):
            rig, client, link = self.player(tcp=True)
            has.tune(client.session.client.sock, *has.CLIENT_KEEPALIVE)
            if what != "it lives":
                self.dead.add(client.session.client.sock)
            again, own = self.logs_in(rig)
            self.assertEqual(self.keepalive(client), (1, 1))
            if what == "he leaves":
                again.hangs_up()
            elif what == "the world dies":
                rig.down()
                self.dead.clear()
            elif what == "kicked":
                rig.hub.control.command({"do": "kick", "who": again.session.number}, None)
            rig.pass_time(*[0.1] * 5)
            self.assertEqual(self.keepalive(client), (60, 15), what)
            self.assertFalse(client.session.place.away_at)

    def test_his_line_drops_while_it_is_asked(self):
        rig, client, link = self.player(tcp=True)
        self.dead.add(client.session.client.sock)
        again, own = self.logs_in(rig)
        client.hangs_up()
        rig.pass_time(*SETTLED)
        self.assertIn(b"Welcome back", again.read())

    def test_an_upgrade_meanwhile(self):
        """The login that waits is read anew by the other program."""
        for is_away in (True, False):
            rig = self.rig()
            client, link = self.away(rig, tcp=True) if is_away else rig.player(tcp=True)
            again, own = self.logs_in(rig)
            rig.upgrade()
            if not is_away:
                self.dead.add(client.session.client.sock)
            rig.pass_time(*[0.1] * 60)
            self.assertFalse(client.session.place.away_at)
            self.assertIn(b"Welcome back", again.read())


class PlaceInEveryState(ReattachCase):
    """The line drops while the world is away, or its user is on his way back."""

    COLUMNS = "PLAYING", "ASKING", "WAITING", "REOPENING", "RETURNING", "BACKOFF"

    def test_drop_and_return(self):
        for column in self.COLUMNS:
            with self.subTest(column):
                rig = self.rig()
                client, link = bring_to(rig, column)
                client.hangs_up()
                self.assertTrue(client.session.place.away_at)
                check_consistent(self, rig)
                again = rig.client()
                again.says("connect Alice pw\r\n")
                rig.pass_time(*SETTLED)
                if column == "RETURNING":
                    self.assertTrue(client.session.place.away_at)
                    rig.let_in(link)
                    rig.pass_time(0.1)
                if column == "ASKING":
                    rig.down()
                    rig.pass_time(0.1)
                if column == "REOPENING":
                    rig.pass_time(*[1] * 10)                    # its connect fails
                self.assertFalse(client.session.place.away_at)
                self.assertIn(b"Welcome back", again.read())
                check_consistent(self, rig)

    def test_what_he_typed_last(self):
        """It goes on when his return is over; but QUIT is QUIT."""
        for words, is_kept in (("say last\r\nhalf", True), ("say last\r\nQUIT\r\n", False)):
            rig, client, link = self.returning()
            client.send(words)
            client.hangs_up()
            self.assertEqual(bool(client.session.place.away_at), is_kept)
            if is_kept:
                rig.let_in(link)
                self.assertEqual(link.read(), b"say last\r\n")

    def test_half_a_line_at_a_world_that_cannot_forget_it(self):
        """It would stand before the next line he types: so he leaves, as without a place."""
        rig = self.rig("teenymush", up=False)
        client = rig.client()
        rig.found("life 1")
        link = rig.game.accept()
        client.says("connect Alice pw\r\n")
        link.says("Last connect was from home\r\n")
        client.says("half")
        client.hangs_up()
        self.assertFalse(rig.hub.places)

    def test_refused_on_his_return(self):
        """The crash has undone him: nobody can come back into this place."""
        rig = self.rig()
        client, link = self.away(rig)
        rig.restart("life 2")
        link = rig.game.accept()
        rig.let_in(link, None)
        rig.pass_time(10.1)
        self.assertFalse(rig.hub.sessions or rig.hub.places)

    def test_his_time_and_that_of_the_outage(self):
        """Whichever ends first ends him."""
        for settings, seconds in (({"hold": 30, "reattach": 60}, 30),
                                  ({"hold": 60, "reattach": 30}, 30)):
            rig = self.rig(**settings)
            client, link = self.away(rig)
            rig.down()
            rig.pass_time(*[1] * (seconds - 1))
            self.assertTrue(rig.hub.sessions)
            rig.pass_time(*[1] * 3)
            self.assertFalse(rig.hub.sessions or rig.hub.places, settings)

    def test_a_client_that_did_not_read(self):
        """What it held is among what he missed, and his link is read again."""
        for how in ("reset", "closed"):
            with self.subTest(how):
                self.stuck_client(how)

    def stuck_client(self, how):
        rig, client, link = self.player(tcp=True, reattach_limit=1 << 20)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.session.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        line, sent = b"x" * 98 + b"\r\n", 0
        while not client.session.client.full:
            link.says(line * 100)
            sent += 100
        if how == "reset":
            client.reset()
        else:
            client.sock.shutdown(socket.SHUT_WR)
        rig.settle()
        self.assertTrue(client.session.place.away_at)
        link.send(line * 2000)                                  # more than a socket takes
        rig.settle(lambda: client.session.client.out.count(b"\n") >= 2000)
        again, own = self.comes_back(rig, tcp=True)
        rig.settle()
        text = b""
        deadline = time.monotonic() + 5
        while b"You are back" not in text and time.monotonic() < deadline:
            text += again.read()
            rig.settle()
        told, = re.findall(rb"You missed (\d+) line\(s\):", text)
        # 4096 bytes and more were in the sockets
        self.assertLessEqual(sent + 2000 - 1300, int(told))
        self.assertLessEqual(int(told), sent + 2000)

    def test_hup(self):
        """On, off and on again: who is connected has a trail, or none, and places end."""
        rig, client, link = self.player(reattach=0)
        for seconds in (300, 0, 300):
            rig.hub.settings = settings_of((("reattach", seconds),))
            rig.hub.places.look()
            self.assertEqual(client.session.client.trail is not None, bool(seconds))
        client.hangs_up()
        self.assertTrue(client.session.place.away_at)
        rig.hub.settings = settings_of((("reattach", 0),))
        rig.hub.places.look()
        self.assertFalse(rig.hub.sessions or rig.hub.places)

    def test_a_hup_forgets_nothing_and_another_login_does(self):
        rig, client, link = self.player()
        link.says("for Alice\r\n")
        rig.hub.places.look()
        self.assertIn(b"for Alice", b"".join(client.session.client.trail.read(0)[:2]))
        client.says("LOGOUT\r\n")
        link.read()
        client.says("connect Bob pw\r\n")
        rig.let_in(link)
        self.assertEqual((state_of(client), len(rig.hub.sessions)), ("PLAYING", 1))
        self.assertNotIn(b"for Alice", b"".join(client.session.client.trail.read(0)[:2]))

    def test_an_older_program_knew_nothing_of_places(self):
        def spoil(state):
            for packed in state["sessions"]:
                for name in ("away_at", "gone_at", "away_host", "outdated", "had"):
                    packed["values"].pop(name, None)
        rig, client, link = self.player()
        rig.upgrade(spoil)
        client.hangs_up()
        again, own = self.comes_back(rig)
        self.assertIn(b"Welcome back", again.read())

    def test_the_world_moves(self):
        """Who is away is taken along like all others, and reads so."""
        rig = self.rig()
        client, link = self.away(rig)
        rig.found("life 9", rig.other, AWAY)
        rig.let_in(rig.other.accept())
        self.assertEqual(state_of(client), "PLAYING")
        again = rig.client()
        rig.other.accept()
        again.send("connect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        lines = again.lines()
        self.assertEqual(lines[lines.index("# MOVED"):],
                         ["# MOVED", "# ONLINE", "# NOTICE # That is all. You are back."])

    def test_a_sudden_death_loses_nothing_that_was_missed(self):
        """What comes for who is away is written down in the turn in which it comes, not all of it
        again and again; what the process before has added is not added twice."""
        if has.why_no_vault():
            self.skipTest(has.why_no_vault())
        rig = self.rig().keep()
        client, link = self.away(rig)
        records, missed = rig.hub.scribe._vault.records, 0
        for lines in (1, 2, 1, 200, 0, 3):
            with mock.patch.object(records, "write", wraps=records.write) as write:
                for missed in range(missed, missed + lines):
                    link.says(b"line %04d \xff\xf9\xe9\r\n" % missed)
                missed += lines > 0
                written = sum(len(it) for call in write.mock_calls for it in call[1][0].values())
            self.assertLess(written, 20000 + 400 * lines)
            rig.die()
            records = rig.hub.scribe._vault.records
        text = self.comes_back(rig)[0].read()
        self.assertEqual(re.findall(rb"line (\d+) \xe9\r\n", text),
                         [b"%04d" % number for number in range(207)])
        self.assertNotIn(b"are lost", text)
        self.assertFalse([it for it in records._places if it >= has.Vault.ADDITIONS])

    @mock.patch.multiple(has, WRITTEN_OF_ALL=has.WRITTEN_BYTES, MOST_PIECES=4)
    def test_a_sudden_death(self):
        """kill -9: the next process has his place, and of much that he missed the newest; the
        others are told as lost."""
        if has.why_no_vault():
            self.skipTest(has.why_no_vault())
        rig = self.rig().keep()
        client, link = self.away(rig)
        for number in range(5000):
            link.send(b"line %04d\r\n" % number)
            if number % 500 == 499:
                rig.settle()
        rig.settle()
        rig.die()
        link.says("behind\r\n")
        again, own = self.comes_back(rig)
        text = again.read().decode()
        shown = re.findall(r"(?m)^line (\d+)\r$", text)
        lost = re.search(r"the first (\d+) line\(s\) are lost", text)
        self.assertEqual(shown, [f"{number:04}" for number in range(5000)][-len(shown):])
        self.assertEqual(int(lost.group(1)) + len(shown), 5000)
        self.assertGreater(len(shown), 1000)
        self.assertIn("behind", text)

    def test_many_who_are_away_stop_nobody(self):
        """What they have missed is written down in turns."""
        if has.why_no_vault():
            self.skipTest(has.why_no_vault())
        rig = self.rig().keep()
        links = [self.away(rig, f"User{number}")[1] for number in range(30)]
        wrote, real = [], rig.hub.scribe._vault.write

        def write(records):
            wrote.append(sum(map(bool, records)))
            return real(records)
        with mock.patch.object(rig.hub.scribe._vault, "write", write), \
                mock.patch.object(has, "RECORDS_A_TURN", 7):
            for link in links:
                link.send((b"x" * 98 + b"\r\n") * 150)
            rig.settle(lambda: not rig.hub.changed)
        self.assertLessEqual(max(wrote), 7)
        self.assertGreaterEqual(sum(wrote), 30)

    def test_an_upgrade_keeps_his_time(self):
        rig = self.rig(reattach=60)
        client, link = self.away(rig)
        rig.pass_time(*[10] * 4)
        rig.upgrade()
        rig.pass_time(*[1] * 18)
        self.assertTrue(rig.hub.places)
        rig.pass_time(3)
        self.assertFalse(rig.hub.sessions or rig.hub.places)


class AwayInAnyOrder(ReattachCase):
    """Random users of two characters come, drop and return while a world comes and goes: nothing
    goes wrong inside HAS, and what is counted adds up."""

    STEPS = ("come", "come", "come", "drop", "drop", "reset", "text", "time", *["little time"] * 4,
             "answers", "answers", "answers", "link ends", "down", "up", "other life", "upgrade",
             "hup", "half", "quit", "verdict")

    def setUp(self):
        lives = mock.patch.object(has, "acknowledged_ago",
                                  lambda sock: self.random.choice((0, 0, math.inf)))
        can = mock.patch.object(has, "can_tell_life", lambda sock: sock is not None)
        for patch in (lives, can):
            patched(self, patch)

    def test_random_steps(self):
        back, real = [], has.Place.take_over

        def take_over(place, newcomer):
            back.append(place.session.state.name)
            real(place, newcomer)
        patched(self, mock.patch.object(has.Place, "take_over", take_over))
        for seed in range(120):
            self.random, life = random.Random(seed), itertools.count(2)
            rig = self.rig()
            links = [rig.player(name, tcp=True)[1] for name in ("Alice", "Bob")]
            rig.game.sock.setblocking(False)
            log = io.StringIO()
            has.log.handlers[:] = [logging.StreamHandler(log)]
            for _ in range(60):
                self.step(rig, links, self.random.choice(self.STEPS), life)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        links.append(rig.game.accept())
                self.check(rig, seed)
            has.log.handlers[:] = [logging.NullHandler()]
            self.assertNotRegex(log.getvalue(), "(?i)fault|traceback", seed)
            rig.close()
        self.assertGreater(len(back), 60)
        self.assertLessEqual({"PLAYING", "WAITING"}, set(back))

    def step(self, rig, links, what, life):
        clients = [it for it in rig.peers if not is_gone(it) and it.sock.fileno() >= 0]
        client = self.random.choice(clients) if clients else None
        link = self.random.choice(links) if links else None
        if what == "come":
            name = self.random.choice(("Alice", "Bob"))
            client = rig.client(tcp=True)
            client.send(f"connect {name} pw\r\n" + self.random.choice(("", "say hi\r\n")))
        elif what in ("half", "quit") and client:
            with contextlib.suppress(OSError):
                client.send("half" if what == "half" else "QUIT\r\n")
        elif what in ("drop", "reset") and client:
            (client.sock.close if what == "drop" else client.reset)()
        elif what == "text" and link and link.sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                link.send(self.random.choice(("text\r\n", "half a line")))
        elif what == "link ends" and link:
            link.sock.close()
        elif what == "answers":
            for it in links:
                asked = it.read() if it.sock.fileno() >= 0 else b""
                mark = re.search(rb"OUTPUTPREFIX (=\w+=)\r\n", asked)
                if mark:
                    with contextlib.suppress(OSError):
                        it.send(b"Welcome\r\n" + mark.group(1) + b"\r\n### Begin INFO\r\n"
                                b"Version: MUX\r\n### End INFO\r\n")
        elif what == "verdict":
            rig.answer()
        elif what == "hup":
            rig.hub.settings = settings_of((("reattach", self.random.choice((0, 5, 300, 300))),))
            rig.hub.places.look()
        else:
            {"down": rig.down, "up": lambda: rig.found(rig.life), "upgrade": rig.upgrade,
             "other life": lambda: rig.found(f"life {next(life)}"),
             "time": lambda: rig.pass_time(3, 10), "little time": lambda: rig.pass_time(0.1, 0.3)
             }.get(what, lambda: None)()
        rig.settle()

    def check(self, rig, seed):
        known = [it.client for it in rig.hub.sessions.values() if it.client.sock]
        known += [it.link for it in rig.hub.sessions.values() if it.link]
        self.assertFalse([it for it in known if it.closed], seed)
        streams = [it for x in rig.hub.sessions.values() for it in (x.client, x.link) if it]
        self.assertFalse([it for it in streams if it.closed], seed)
        away = [it for it in rig.hub.sessions.values() if it.place.away_at]
        self.assertEqual({it.number for it in away}, set(rig.hub.places.sessions), seed)
        self.assertEqual(sum(rig.hub.places._hosts.values()), len(away))
        self.assertEqual(sum(rig.hub.door._hosts.values()), len(rig.hub.sessions) - len(away))
        self.assertEqual(rig.hub.places._bytes,
                         sum(len(it.client.out) + len(it.client.doubtful) for it in away))
        for session in rig.hub.sessions.values():
            self.assertIs(session.client, session.screen.client)
            self.assertIs(session.client, session.inbox.client)
            self.assertIs(session.client.owner, session)


class AnotherClient(RigCase):
    """Another client at a link that lives: what they agree on, and not one command more
    (REATTACH.md 9)."""

    OFFERS = (WILL, 25), (DO, NAWS), (DO, TTYPE), (DO, CHARSET), (WILL, GMCP)

    def client(self, rig, size=None, kind=None, charset=None, gmcp=None, refuses=()):
        """A client that answers a world's offers so, and the world's end of its link."""
        client, link = rig.newcomer()
        link.says(offer(*self.OFFERS))
        says = []
        for verb, option in self.OFFERS:
            wants = {NAWS: size, TTYPE: kind, CHARSET: charset,
                     GMCP: gmcp}.get(option, True) and option not in refuses
            says.append(({WILL: DO, DO: WILL} if wants else {WILL: DONT, DO: WONT})[verb])
        client.send(b"".join(command(verb, option) for verb, (_, option) in zip(says, self.OFFERS)))
        if size:
            client.send(sub(NAWS, struct.pack(">HH", *size)))
        if kind:
            client.send(sub(TTYPE, b"\0" + kind))
        if charset:
            link.says(sub(CHARSET, b"\x01;UTF-8;ISO-8859-1"))
            client.send(sub(CHARSET, b"\x02" + charset))
        if gmcp:
            client.send(sub(GMCP, b"Core.Hello " + gmcp))
        rig.settle()
        client.read(), link.read()
        return client, link

    def joined(self, first, second):
        """What the link gets when the second client takes the first one's place, and what the
        second one does."""
        rig = self.rig(reattach=300)
        client, link = self.client(rig, **first)
        client.says("connect Alice pw\r\n")
        rig.let_in(link)
        client.hangs_up()
        if second is None:
            again = rig.client()
            rig.game.accept().says(offer(*self.OFFERS))
            again.read()
        else:
            again, _ = self.client(rig, **second)
        link.read()
        again.says("connect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        self.assertFalse(client.session.place.away_at)
        return rig, link, again

    FULL = {"size": (120, 50), "kind": b"MUDLET", "charset": b"UTF-8", "gmcp": b"one"}

    def test_the_same_again(self):
        rig, link, again = self.joined(self.FULL, self.FULL)
        self.assertEqual(link.read(), sub(TTYPE, b"\0MUDLET")
                         + sub(NAWS, struct.pack(">HH", 120, 50))
                         + sub(GMCP, b"Core.Hello one"))

    def test_another_size_and_type(self):
        rig, link, again = self.joined(self.FULL,
                                       dict(self.FULL, size=(71, 23), kind=b"XTERM", gmcp=None))
        sent = link.read()
        self.assertEqual(sent, sub(TTYPE, b"\0XTERM") + sub(NAWS, b"\0\x47\0\x17")
                         + command(DONT, GMCP))
        link.says(command(WONT, GMCP) + b"text\r\n")            # its answer is not for the client
        self.assertTrue(again.read().endswith(b"\r\ntext\r\n"))

    def test_one_that_speaks_no_telnet(self):
        rig, link, again = self.joined(self.FULL, None)
        sent = link.read()
        for piece in (command(DONT, 25), command(DONT, GMCP), sub(TTYPE, b"\0UNKNOWN"),
                      sub(NAWS, b"\0\x4e\0\x18"), sub(CHARSET, b"\x02ISO-8859-1")):
            self.assertEqual(sent.count(piece), 1, piece)
        self.assertNotIn(command(DO, CHARSET), sent)
        self.assertNotIn(b"\xff", again.read())
        again.hangs_up()                                      # and a full one again
        third, _ = self.client(rig, **self.FULL)
        link.read()
        third.says("connect Alice pw\r\n")
        sent = link.read()
        self.assertIn(sub(NAWS, struct.pack(">HH", 120, 50)), sent)
        self.assertIn(sub(CHARSET, b"\x02UTF-8"), sent)
        self.assertNotIn(command(DO, CHARSET), sent)
        self.assertEqual(sent.count(command(DO, 25)), 1)

    def test_the_character_set_of_what_was_missed(self):
        for first, second, wanted in ((b"UTF-8", b"ISO-8859-1",
                                       "caf\xe9 \"so\" -".encode("latin-1")), (b"ISO-8859-1",
                                       b"UTF-8", "caf\xe9".encode()), (b"UTF-8", b"UTF-8",
                                       "caf\xe9 \u201cso\u201d \u2013".encode())):
            rig = self.rig(reattach=300)
            client, link = self.client(rig, **dict(self.FULL, charset=first))
            client.says("connect Alice pw\r\n")
            rig.let_in(link)
            client.hangs_up()
            said = "caf\xe9 \u201cso\u201d \u2013" if first == b"UTF-8" else "caf\xe9"
            link.says(said.encode(first.decode()) + b"\r\n")
            again, _ = self.client(rig, **dict(self.FULL, charset=second))
            again.says("connect Alice pw\r\n")
            self.assertIn(wanted + b"\r\n", again.read(), (first, second))

    def test_iac_in_what_was_missed(self):
        """A byte 255 is doubled on the wire, and a character of its own in Latin-1."""
        for first, second, wanted in ((b"ISO-8859-1", b"UTF-8", "\xff!".encode()),
                                      (b"UTF-8", b"ISO-8859-1", b"\xff\xff!")):
            rig = self.rig(reattach=300)
            client, link = self.client(rig, **dict(self.FULL, charset=first))
            client.says("connect Alice pw\r\n")
            rig.let_in(link)
            client.hangs_up()
            link.says("\xff!".encode(first.decode()).replace(b"\xff", b"\xff\xff") + b"\r\n")
            again, _ = self.client(rig, **dict(self.FULL, charset=second))
            again.says("connect Alice pw\r\n")
            self.assertIn(b"\r\n" + wanted + b"\r\n", again.read())

    def away(self, rig, **kind):
        """Somebody with such a client, whose line has dropped: the world's end of his link."""
        client, link = self.client(rig, **kind)
        client.says("connect Alice pw\r\n")
        rig.let_in(link)
        client.hangs_up()
        link.read()
        return client, link

    def test_one_that_was_asked_nothing(self):
        """The world had no time to, or is of few words: a client that speaks is asked by HAS, and
        its yes is
        for nobody; for one that does not, all stays as it was."""
        rig = self.rig(reattach=300)
        client, link = self.away(rig, **self.FULL)
        again, own = rig.newcomer()
        own.send(b"Welcome\r\n")
        again.send("connect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        self.assertIn(b"Welcome back", again.read())
        self.assertEqual(link.read(), b"")
        again.hangs_up()
        third, own = rig.newcomer()
        own.says(offer((WILL, 25)))
        third.send(command(DO, 25) + b"connect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        asked = third.read()
        for piece in (command(DO, NAWS), command(DO, TTYPE), command(WILL, GMCP)):
            self.assertEqual(asked.count(piece), 1, piece)
        self.assertEqual(link.read(), b"")
        third.says(command(WILL, NAWS) + sub(NAWS, b"\0\x47\0\x17") + command(WILL, TTYPE)
                   + command(DONT, GMCP))
        self.assertEqual(link.read(), sub(NAWS, b"\0\x47\0\x17") + command(DONT, GMCP))
        self.assertEqual(third.read(), sub(TTYPE, b"\1"))
        third.says(sub(TTYPE, b"\0XTERM"))
        self.assertEqual(link.read(), sub(TTYPE, b"\0XTERM"))

    def test_one_that_logs_in_before_the_world_has_asked_it(self):
        rig = self.rig(reattach=300)
        client, link = self.away(rig, **self.FULL)
        again = rig.client()
        again.send("connect Alice pw\r\n")
        own = rig.game.accept()
        rig.settle()
        own.send(offer((DO, NAWS), (DO, TTYPE)))
        rig.pass_time(0.1)
        again.says(command(WILL, NAWS) + sub(NAWS, b"\0\x47\0\x17") + command(WONT, TTYPE))
        self.assertTrue(client.session.place.away_at)
        rig.pass_time(0.11)
        self.assertFalse(client.session.place.away_at)
        self.assertEqual(link.read(), sub(TTYPE, b"\0UNKNOWN") + sub(NAWS, b"\0\x47\0\x17"))

    def test_an_option_that_the_link_never_had(self):
        rig, link, again = self.joined({}, self.FULL)
        sent = link.read()
        for piece in (command(WILL, NAWS) + sub(NAWS, struct.pack(">HH", 120, 50)),
                      command(WILL, TTYPE) + sub(TTYPE, b"\0MUDLET"),
                      command(DO, GMCP) + sub(GMCP, b"Core.Hello one"),
                      command(WILL, CHARSET) + sub(CHARSET, b"\x02UTF-8")):
            self.assertEqual(sent.count(piece), 1, piece)
        # a no is for the client; the world had asked
        link.says(command(DONT, TTYPE) + command(WILL, GMCP))
        self.assertIn(command(DONT, TTYPE), again.read())

    def test_while_the_world_is_away(self):
        """What the new client has settled elsewhere is brought to the next link."""
        rig = self.rig(reattach=300)
        client, link = self.away(rig, **self.FULL)
        again, own = self.client(rig, **dict(self.FULL, size=(71, 23)))
        rig.down()
        again.send("connect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        self.assertFalse(client.session.place.away_at)
        rig.found("life 2")
        self.assertIn(command(WILL, NAWS) + sub(NAWS, b"\0\x47\0\x17"), rig.game.accept().read())

    def test_the_next_upgrade_knows_what_the_link_has_had(self):
        rig, link, again = self.joined(self.FULL, None)
        again.hangs_up()
        rig.upgrade()
        third, _ = self.client(rig, **self.FULL)
        link.read()
        third.send("connect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        sent = link.read()
        self.assertIn(sub(NAWS, struct.pack(">HH", 120, 50)), sent)
        for verb in (WILL, DO):
            for option in (NAWS, TTYPE, CHARSET):
                self.assertNotIn(command(verb, option), sent)

    def test_settings_typed_at_the_login_screen(self):
        """The link gets what the new client has set there, and a prefix that it has not is
        cleared."""
        rig, client, link = self.newcomer(reattach=300)
        client.says("OUTPUTPREFIX <\r\nOUTPUTSUFFIX >\r\nSCREENWIDTH 120\r\nconnect Alice pw\r\n")
        mark = re.findall(rb"OUTPUTPREFIX (=\w+=)\r\n", link.read())[0]
        link.says(b"Welcome\r\n" + mark + b"\r\n")
        client.hangs_up()
        again, own = rig.newcomer()
        again.send("OUTPUTSUFFIX ]\r\nSCREENHEIGHT 20\r\nconnect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        self.assertEqual(link.read(), b"OUTPUTPREFIX\r\nOUTPUTSUFFIX ]\r\nSCREENHEIGHT 20\r\n")
        self.assertEqual(client.session.lines.settings,
                         {b"OUTPUTSUFFIX": b"]", b"SCREENWIDTH": b"120", b"SCREENHEIGHT": b"20"})

    def test_pueblo(self):
        """Who reads tags cannot go on as one who does not, nor the other way round."""
        for first, second in itertools.product((True, False), repeat=2):
            rig, client, link = self.newcomer(reattach=300)
            client.says("PUEBLOCLIENT 2.50\r\n" * first + "connect Alice pw\r\n")
            rig.let_in(link)
            client.hangs_up()
            again, own = rig.newcomer()
            again.send("PUEBLOCLIENT 2.50\r\n" * second + "connect Alice pw\r\n")
            rig.pass_time(*SETTLED)
            self.assertEqual(bool(client.session.place.away_at), first != second)
            self.assertEqual(b"connect Alice pw" in own.read(), first != second)

    def test_a_websocket_has_no_place_and_joins_none(self):
        rig = self.rig("pennmush", reattach=300)
        client, link = rig.client(), rig.game.accept()
        client.says("GET /wsclient HTTP/1.1\r\nUpgrade: websocket\r\n\r\n")
        client.session.character.login = has.Credentials(b"connect", b"Alice", b"pw")
        client.session.state = has.State.PLAYING
        self.assertFalse(client.session.place.keep(""))
        client.session.character.login = None
        link.says("HTTP/1.1 101 Switching Protocols\r\n\r\n")
        alice, link = rig.client(), rig.game.accept()
        alice.says("connect Alice pw\r\n")
        mark = re.search(rb"OUTPUTPREFIX (=\w+=)a\r\n", link.read()).group(1)
        link.says(b"Welcome\r\n" + mark + b"a\r\n \r\n" + mark + b"z\r\n")
        self.assertEqual(state_of(alice), "PLAYING")
        alice.hangs_up()
        client.send(b"\x81\x10connect Alice pw\r\nconnect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        self.assertTrue(alice.session.place.away_at)

    def test_no_chain_of_clients_says_what_kills_a_pennmush(self):
        """DO CHARSET behind ACCEPTED, whatever the clients agree to (REATTACH.md 13)."""
        kinds = [self.FULL, {}, {"charset": b"UTF-8"}, {"size": (80, 24)},
                 dict(self.FULL, charset=b"US-ASCII")]
        for first, second in itertools.product(kinds, kinds):
            rig, link, again = self.joined(first, second)
            sent = link.read()
            again.says("say hi\r\n")
            sent += link.read()
            self.assertNotIn(command(DO, CHARSET), sent)
            self.assertTrue(sent.endswith(b"say hi\r\n"))


class WhatWasOnTheWay(unittest.TestCase):
    """Trail, with a kernel that says how much it was not acknowledged."""

    def trail(self, limit=1 << 16, slack=0):
        self.left = 0
        return has.Trail(limit, lambda: self.left, slack)

    def test_every_split(self):
        text = b"one\r\ntwo\r\nthree\r\n"
        for size in range(1, len(text) + 1):
            for left in range(len(text) + 1):
                trail = self.trail()
                for start in range(0, len(text), size):
                    trail.add(text[start:start + size])
                begin = text.rfind(b"\n", 0, len(text) - left) + 1 if left else len(text)
                admitted, unseen, _ = trail.read(left)
                self.assertEqual(unseen, text[begin:], (size, left))
                self.assertEqual(admitted, text[:text.rfind(b"\n", 0, len(text) - left) + 1])

    def test_memory(self):
        trail = self.trail()
        for number in range(100000):
            trail.add(b"line %d\r\n" % number)
            self.assertLess(sum(map(len, trail.chunks)), 8192)
        admitted, unseen, lost = trail.read(0)
        self.assertEqual(admitted.split(b"\r\n"), [b"line %d" % n for n in range(99980, 100000)]
                         + [b""])
        self.assertEqual((unseen, lost), (b"", 0))
        trail.rest()
        self.assertLess(sum(map(len, trail.chunks)), 400)
        self.assertTrue(trail.read(0)[0].endswith(b"line 99999\r\n"))

    def test_what_is_too_much_is_counted(self):
        """The kernel holds more than is kept of what it was not acknowledged."""
        for slack in (0, 5000):
            trail = self.trail(4096, slack)
            for number in range(1000):
                trail.add(b"line %03d\r\n" % number)
                self.left = 10 * (number + 1)               # the client gets nothing any more
            admitted, unseen, lost = trail.read(self.left)
            shown = unseen.split(b"\r\n")[:-1]
            self.assertEqual(shown, [b"line %03d" % n for n in range(1000)][-len(shown):])
            self.assertEqual((len(shown) + lost, admitted), (1000, b""))
            self.assertLess(sum(map(len, trail.chunks)), 3 * (4096 + 2048))
            self.left = 0                                       # and then everything
            trail.trim()
            self.assertEqual(trail.read(0)[1:], (b"", 0))
            self.assertLess(sum(map(len, trail.chunks)), 5000 + slack)

    def test_what_another_process_may_still_have_is_not_forgotten(self):
        trail = self.trail(slack=5000)
        for number in range(10000):
            trail.add(b"line %05d\r\n" % number)
        self.assertEqual(trail.read(5000)[1].split(b"\r\n")[0], b"line 09583")
        trail.rest()                            # but that was long ago
        self.assertLess(sum(map(len, trail.chunks)), 400)

    def test_how_much_is_doubted(self):
        trail = self.trail()
        for number in range(100):
            trail.add(b"line %02d\r\n" % number)
        for doubted, lines in ((0, 20), (9 * 20, 20), (9 * 50, 50), (9 * 200, 100)):
            self.assertEqual(trail.read(0, doubted=doubted)[0].count(b"\n"), lines)

    def test_no_part_of_a_line_is_admitted(self):
        trail = self.trail()
        for number in range(5000):
            trail.add(b"line %d: " % number)
            trail.add(b"the end of it, in another write\r\n")
        for line in trail.read(0)[0].split(b"\r\n")[:-1]:
            self.assertRegex(line, rb"\Aline \d+: the end of it, in another write\Z")

    def test_broken_for_long(self):
        trail = self.trail(limit=1000)
        for number in range(1000):
            trail.add_lost(b"line %03d\r\n" % number)
            self.assertLess(len(trail.lost), 2100)
        _, unseen, lost = trail.read(0)
        self.assertEqual(unseen.count(b"\n") + lost, 1000)
        self.assertTrue(unseen.endswith(b"line 999\r\n"))

    def test_broken(self):
        trail = self.trail()
        trail.add(b"got\r\nhalf")
        trail.add_lost(b" a line\r\nmore\r\n")
        self.assertEqual(trail.read(2)[1], b"half a line\r\nmore\r\n")

    def test_many_have_one_journal(self):
        """What stands in it is in the trails as it was sent, whatever went another way."""
        journal, streams, sent = has.Journal(), [], [b"", b"", b""]
        for _ in sent:
            ours, theirs = tcp_pair()
            self.addCleanup(ours.close)
            streams.append(has.Stream(selectors.DefaultSelector(), theirs, mock.Mock(), None))
            self.addCleanup(streams[-1].drop)
            has.follow(streams[-1], 1 << 20, journal)
            streams[-1].trail.ask = lambda: 1 << 20
        for number in range(has.MANY_NOTES):
            who = number * 7 % 3
            line = b"%d: line %05d%s\r\n" % (who, number, b"." * (3000 * (number % 999 == 0)))
            streams[who].send(line)
            sent[who] += line
            self.assertLessEqual(len(journal.recent), has.MANY_NOTES)
        for stream, text in zip(streams, sent):
            _, unseen, lost = stream.trail.read(1 << 20)
            self.assertEqual((unseen + stream.out, lost), (text, 0))
        self.assertEqual(journal.recent, [])

    def test_who_has_gone_is_in_no_journal(self):
        """Or others would be in trouble when his lines are taken out of it."""
        for ends in (lambda stream: stream.drop(), lambda stream: has.follow(stream, 0)):
            ours, theirs = tcp_pair()
            self.addCleanup(ours.close)
            stream, journal = (has.Stream(selectors.DefaultSelector(), theirs, mock.Mock(), None),
                               has.Journal())
            has.follow(stream, 1 << 20, journal)
            trail = stream.trail
            for _ in range(100):
                stream.send(b"a line of eighty columns".ljust(80, b".") + b"\r\n")
            ends(stream)
            self.assertEqual(journal.recent, [])
            self.assertEqual(len(trail.read(0)[0].split(b"\n")), has.DOUBTFUL_LINES + 1)
            stream.drop()

    def test_a_flood_cut_in_the_middle(self):
        """Real sockets: what the client has read and what it is shown again are everything,
        once."""
        for _ in range(8):
            ours, theirs = tcp_pair()
            stream = has.Stream(selectors.DefaultSelector(), theirs, mock.Mock(), None)
            has.follow(stream, 1 << 20)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            seen, fed = b"", 0
            while len(stream.out) < 5000:
                stream.send(b"line %05d\r\n" % fed)
                fed += 1
                if fed % 97 == 0:
                    seen += ours.recv(random.randrange(1, 200))
            ours.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(random.randrange(20)):
                    seen += ours.recv(1000)
            left, unread, until = -1, b"", time.monotonic() + 5
            while len(seen
                      + unread) + left + len(stream.out) != 12 * fed and time.monotonic() < until:
                left = has.unacknowledged(theirs)               # it goes on while we look
                with contextlib.suppress(BlockingIOError):
                    unread = ours.recv(1 << 22, socket.MSG_PEEK)
            stuck = stream.trail.read(left, bool(stream.out))[1] + bytes(stream.out)
            acknowledged = seen + unread
            whole = acknowledged[:acknowledged.rfind(b"\n") + 1]
            self.assertEqual((whole + stuck).count(b"line"), fed)
            ours.close()
            stream.drop()


class OnePiece(RigCase):
    """Many small pieces in one read cost others little: what they bring goes out in one send."""

    def sends(self, act):
        with mock.patch.object(has.Stream, "send", autospec=True,
                               side_effect=has.Stream.send) as send:
            act()
        return [bytes(call.args[1]) for call in send.call_args_list if call.args[1]]

    def test_answers_to_a_client(self):
        rig, client, link = self.player()
        rig.down()
        client.read()
        client.send(command(DO, 6) * 4 + b"\xff\xf6" * 3 + b"one\r\ntwo\r\n")
        sent, = self.sends(rig.settle)
        self.assertEqual(sent.count(command(WONT, 6)), 4)
        self.assertEqual(sent.count(b"[Yes]"), 3)
        self.assertIn(b"UNSENT two", sent)

    def test_text_of_a_world(self):
        rig, client, link = self.player()
        link.send(b"a\xff\xf9b\r\n" * 50 + b"end\r\n")
        self.assertEqual(self.sends(rig.settle), [b"a\xff\xf9b\r\n" * 50 + b"end\r\n"])

    def test_a_goodbye_stands_behind_it(self):
        rig, client, link = self.player()
        rig.down()
        client.read()
        client.says("one\r\nQUIT\r\n")
        self.assertEqual((state_of(client), client.lines()), ("CLOSING", ["# UNSENT one"]))


class ExpectedLines(RigCase):
    """What the world says to settings HAS repeats is hidden: whole lines, once, not for ever."""

    def back(self):
        rig, client, link = self.player("Alice")
        client.says("OUTPUTPREFIX ab\r\nOUTPUTSUFFIX cd\r\n")
        rig.restart("life 2")
        link = rig.game.accept()
        rig.let_in(link)
        self.assertEqual(state_of(client), "PLAYING")
        client.read()
        return rig, client, link

    def test_only_whole_lines_in_every_split(self):
        text = b"xab\r\nab\r\nabc\r\ncd\r\nab\r\nend\r\n"
        for cut in range(1, len(text)):
            rig, client, link = self.back()
            shown = b""
            for part in (text[:cut], text[cut:]):
                link.says(part)
                shown += client.read()
            self.assertEqual(shown, b"xab\r\nabc\r\nab\r\nend\r\n", cut)
            rig.close()

    def test_they_expire(self):
        rig, client, link = self.back()
        rig.pass_time(has.EXPECT_SECONDS + 0.1)
        link.says(b"ab\r\n")
        self.assertEqual((client.lines(), client.session.screen.careful), (["ab"], False))


class ArrivalNoise(RigCase):
    """Rule 6."""

    def start(self):
        rig = self.rig()
        clients = [rig.player(name)[0] for name in ("Alice", "Bob")]
        rig.restart("life 2")
        links = [rig.game.accept(), rig.game.accept()]
        for link in links:
            rig.let_in(link)
        clients[0].read()
        return rig, clients[0], links[0]

    def test_hidden_in_every_split(self):
        rig, client, link = self.start()
        text = b"Carol has connected.\r\nBob has connected.\r\nBob waves.\r\n"
        for split in range(1, len(text)):
            link.says(text[:split])
            link.says(text[split:])
            self.assertEqual(client.read(), b"Carol has connected.\r\nBob waves.\r\n", split)

    def test_which_lines(self):
        rig, client, link = self.start()
        for line, shown in ((b"BOB has reconnected.", 0), (b"Bob has disconnected.", 0),
                            (b"Bobby has connected.", 1), (b"Bob has connected. Not!", 1),
                            (b"Dora: Bob has connected.", 1), (b"Bob has", 1)):
            link.says(line + b"\r\n")
            self.assertEqual(client.read(), (line + b"\r\n") * shown)

    def test_a_prompt_is_shown_and_the_time_ends(self):
        rig, client, link = self.start()
        link.says(b"Bo")
        self.assertEqual(client.read(), b"")
        rig.pass_time(0.4)
        self.assertEqual(client.read(), b"Bo")
        link.send(b"at> \r\n")
        rig.pass_time(10)
        client.read()
        link.says(b"Bob has connected.\r\n")
        self.assertEqual(client.read(), b"Bob has connected.\r\n")


class Notices(RigCase):
    """Rules 10 and 11."""

    def begin(self, text):
        rig, client, link = self.player()
        link.says(text)
        rig.heard("silent")
        client.says("hello\r\n")
        return rig, client, link

    def test_never_inside_a_sequence(self):
        for whole, cuts in ((b"a \x1b[31mred\x1b[0m b", range(1, 14)),
                            ("caf\u00e9 \u2603".encode(), range(1, 9)),
                            (b"\xff\xfa\x18\x01\xff\xf0go", range(1, 6)),
                            (b"\xff\xfb\x01go", range(1, 3)),
                            (b"\x1b]0;title\x07go", range(1, 10))):
            for cut in cuts:
                with self.subTest(whole=whole, cut=cut):
                    rig, client, link = self.begin(whole[:cut])
                    rig.pass_time(0.9)
                    link.says(whole[cut:] + b"\r\n")
                    rig.pass_time(2)
                    sent = client.read()
                    self.assertIn(whole, sent)
                    reset = b"\x1b[0m" if b"\x1b" in whole else b""
                    self.assertEqual(sent.replace(reset + b"# SILENT\r\n", b""), whole + b"\r\n")

    def test_waits_1_s_at_most(self):
        for prompt, wanted in ((b"prompt> ", b"prompt> \r\n# SILENT\r\n"), (b"", b"# SILENT\r\n"),
                               (b"\x1b[3", b"\x1b[3m\x1b[0m\r\n# SILENT\r\n"),
                               (b"x\r\n", b"x\r\n# SILENT\r\n"),
                               (b"\x1b[31mx\r\n", b"\x1b[31mx\r\n\x1b[0m# SILENT\r\n")):
            with self.subTest(prompt=prompt):
                rig, client, _ = self.begin(prompt) if prompt else self.begin(b"\r\n")
                rig.pass_time(1.1)
                self.assertEqual(client.read().replace(b"\r\n" * (not prompt), b"", 1), wanted)

    def test_escapes_only_for_clients_that_were_sent_one(self):
        rig = self.rig()
        (plain, plain_link), (bright, bright_link) = rig.player(), rig.player("Bob")
        bright_link.says("\x1b[31mred")
        bright_link.send(" still\r\n")             # the colour is on, the line is not the last
        plain_link.says("grey\r\n")
        for life in ("life 2", "life 3"):
            for client in (plain, bright):
                client.read()
            rig.down()
            self.assertEqual((plain.read(), bright.read()),
                             (b"# OFFLINE\r\n", b"\x1b[0m# OFFLINE\r\n"))
            rig.found(life)
            for link in (rig.game.accept(), rig.game.accept()):
                rig.let_in(link, "\x1b[1mLimbo\x1b[0m")       # not shown
            self.assertEqual((plain.read(), bright.read()),
                             (b"# ONLINE\r\n", b"\x1b[0m# ONLINE\r\n"))

    def test_an_escape_on_the_quick_way(self):
        for text in (b"a\x1b[31mb\r\n", b"\x1b[31m"):
            with self.subTest(text):
                rig, client, link = self.player()
                rig.pass_time(has.MARK_SECONDS + 1)
                self.assertFalse(client.session.screen.careful)
                link.says("one\r\n")
                self.assertFalse(client.session.screen.spelling.coloured)
                link.says(text)
                self.assertTrue(client.session.screen.spelling.coloured)
                self.assertEqual(client.session.link.on_data, client.session.screen.on_link_data)
                self.assertEqual(client.read(), b"one\r\n" + text)

    def test_in_the_character_set_that_was_agreed(self):
        for said, shown in ((b"", "zur\u00fcck".encode()),
                            (b"\xff\xfa\x2a\x02ISO-8859-1\xff\xf0", b"zur\xfcck"),
                            (b"\xff\xfa\x2a\x02US-ASCII\xff\xf0", b"zuruck"),
                            (b"\xff\xfa\x2a\x02UTF-8\xff\xf0", "zur\u00fcck".encode())):
            with self.subTest(said):
                rig, client, _ = self.player(online_notice="zur\u00fcck")
                client.says(said + b"look\r\n")
                rig.restart("life 2")
                client.read()
                rig.let_in(rig.game.accept())
                self.assertEqual(client.read(), shown + b"\r\n")

    def test_pueblo_reads_no_tags_in_what_has_says(self):
        rig, client, link = self.player()
        client.says("PUEBLOCLIENT 2.50\r\n")
        link.says('<a href="x')
        client.read()
        rig.down()
        client.says("say <b>&\r\n")
        self.assertEqual(client.read(), b'">\r\n# OFFLINE\r\n# UNSENT say &lt;b&gt;&amp;\r\n')

    def test_text_before_a_reset_is_shown(self):
        for typed in (False, True):
            with self.subTest(typed=typed):
                rig, client, link = self.player()
                link.send("last words\r\n")
                link.reset()
                if typed:
                    client.send("hello\r\n" * 3)
                rig.settle()
                self.assertEqual((client.lines(), state_of(client)), (["last words"], "ASKING"))

    def test_text_before_the_world_is_known_to_be_down(self):
        rig, client, link = self.player()
        link.send("Shutting down.\r\n")
        rig.hub.heard("lost", "gone", True)                 # before the link was read
        self.assertEqual(client.lines(), ["Shutting down.", "# OFFLINE"])


class Browsers(RigCase):
    """A client whose first line is an HTTP request: PennMUSH's websocket speaks frames."""

    REQUEST = b"GET /wsclient HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n"
    FRAMES = b"\x81\x86\xff\xfb\x56\n\xff\xff\xfa\rconnect a b\r\n\xff\xfd\x06QUIT\r\n\x08\x7f\xff"

    def browser(self, request=REQUEST, family="pennmush", **how):
        rig, client, link = self.newcomer(**how, family=family)
        client.says(request)
        return rig, client, link

    def test_frames_pass_as_they_are(self):
        for kept in (False, True):
            with self.subTest(kept=kept):
                self.check_frames(kept)

    def check_frames(self, kept):
        rig = self.rig("pennmush")
        client, link = (rig.keep() if kept else rig).newcomer()
        client.says(self.REQUEST)
        for size in (1, 7, 100):
            for at in range(0, len(self.FRAMES), size):
                for here, there in ((client, link), (link, client)):
                    here.says(self.FRAMES[at:at + size])
        self.assertEqual(link.read(), self.REQUEST + self.FRAMES * 3)
        self.assertEqual(client.read(), self.FRAMES * 3)
        with self.assertLogs("has", "INFO") as caught:
            link.sock.close()
            rig.settle(lambda: is_gone(client) or client.session.client._finishing)
        self.assertEqual((client.read(), rig.beat.asks), (b"", []))
        self.assertIn("HTTP", caught.output[0])

    def test_a_request_that_comes_before_the_link_is_open(self):
        rig = self.rig("pennmush")
        rig.found("life 1", rig.full)
        client = rig.client()
        client.says(self.REQUEST + self.FRAMES)
        self.assertEqual(client.session.inbox.kept, self.REQUEST + self.FRAMES)
        rig.pass_time(11)
        self.assertEqual((client.read(), client.ended), (b"", True))

    def test_no_notice_and_not_held(self):
        for family in ("pennmush", "tinymux", "rhostmush", "teenymush", "tinymush", "plain"):
            for request in (self.REQUEST, b"POST /x HTTP/1.0\n", b"HEAD / HTTP/1.1\r\n"):
                with self.subTest(family=family, request=request):
                    rig, client, _ = self.browser(request, family)
                    client.read()
                    rig.heard("silent")
                    client.says(b"\x81\x82hello\r\n")
                    rig.pass_time(2)
                    client.session.screen.write("# a notice to all")
                    with self.assertLogs("has", "INFO") as caught:
                        rig.down()
                    self.assertEqual((client.read(), client.ended), (b"", True))
                    self.assertIn("HTTP", "".join(caught.output))

    def test_while_the_world_is_down(self):
        rig = self.rig("pennmush")
        rig.down()
        client = rig.client()
        client.read()
        client.says(self.REQUEST)
        self.assertEqual((client.read(), client.ended), (b"", True))

    def test_only_such_a_request_in_one_piece_goes_past_the_reader(self):
        """Else it would be a way round rule 9, the brake and the line reader."""
        for family, pieces in (("rhostmush", [self.REQUEST, b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"]),
                               ("teenymush", [self.REQUEST, b"@remotehostname evil\r\n"])):
            rig, client, link = self.newcomer(family=family)
            for piece in pieces:
                client.says(piece)
            self.assertNotIn(pieces[-1], link.read())
        for pieces, raw in (([self.REQUEST], True), ([b"GET /wsclient HT", b"TP/1.1\r\n"], False),
                            ([b"hello\r\n" + self.REQUEST], False),
                            ([b"hello\r\n", self.REQUEST], False),
                            ([b"GET me a drink\r\n"], False), ([b"get / HTTP/1.1\r\n"], False)):
            rig, client, _ = self.newcomer(family="pennmush")
            for piece in pieces:
                client.says(piece)
            self.assertIs(client.session.inbox.first.is_raw, raw, pieces)

    def test_who_does_not_read_has_a_bound(self):
        rig, client, link = self.browser()
        rig.settings.output_limit = 300000
        link.sock.setblocking(True)
        sender = threading.Thread(target=lambda: self.assertRaises(OSError, link.sock.sendall,
                                                                   b"\xff" * 20000000), daemon=True)
        sender.start()
        deadline = time.monotonic() + 10
        while not is_gone(client) and state_of(client) != "CLOSING":
            self.assertLess(time.monotonic(), deadline)
            rig.hub.turn(0.01)
            rig.clock.advance(0.5)
        sender.join(5)

    def websockets(self, rig, *hosts, request=REQUEST):
        """What each of so many clients, one after another, gets of the world's answer."""
        got = []
        for host in hosts:
            client = rig.client(host=host)
            rig.pass_time(0.1)
            link = rig.game.accept()
            client.says(request)
            if request not in link.read():
                request_line = client.read()
                self.assertTrue(client.ended)
                got.append(
                    re.match(rb"HTTP/1.1 429 [^\n]*\nRetry-After: (\d+)\r\n(?s:.*)\r\n\r\n\Z",
                             request_line).group(1))
            else:
                got.append(b"ok")
            client.hangs_up()
        return got

    def test_websockets_of_one_address_are_braked_like_logins(self):
        """Nobody can read the logins in their frames."""
        for host in ("203.0.113.9", "2001:db8::5"):
            rig = self.rig("pennmush")
            self.assertEqual(self.websockets(rig, *[host] * 5), [b"ok"] * 3 + [b"3"] * 2)
            self.assertEqual(self.websockets(rig, "198.51.100.7"), [b"ok"])
            rig.pass_time(3)
            self.assertEqual(self.websockets(rig, host, host), [b"ok", b"6"])

    def test_logins_and_websockets_count_together(self):
        rig = self.rig("pennmush")
        client = rig.client()
        rig.pass_time(0.1)
        link = rig.game.accept()
        client.says("connect bob x\r\n" * 2)
        self.assertEqual(link.lines().count("connect bob x"), 2)
        self.assertEqual(self.websockets(rig, "203.0.113.9", "203.0.113.9"), [b"ok", b"3"])
        client.says("connect bob x\r\n")
        self.assertEqual(link.lines().count("connect bob x"), 0)
        rig.pass_time(3.1)
        self.assertEqual(link.lines().count("connect bob x"), 1)

    def test_what_may_turn_into_frames_counts_and_pages_do_not(self):
        page, many = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", ["203.0.113.9"] * 5
        for request, braked in ((page, False), (b"POST /a HTTP/1.0\n\nwords", False),
                                (b"GET /wsclient HTTP/1.1\r\n", True),
                                (b"GET /wsclient HTTP/1.1\r\nHost: x\r\n", True),
                                (self.REQUEST.upper(), True),
                                (page.replace(b"Host", b"Sec-WebSocket-Key"), True)):
            with self.subTest(request):
                self.assertEqual(self.websockets(self.rig("pennmush"), *many, request=request),
                                 [b"ok"] * 3 + [b"3" if braked else b"ok"] * 2)

    def test_this_machines_own_are_not_braked(self):
        self.assertEqual(self.websockets(self.rig("pennmush"), *["127.0.0.1"] * 9), [b"ok"] * 9)

    def test_it_goes_through_an_upgrade(self):
        rig, client, link = self.browser()
        rig.upgrade()
        self.assertEqual((client.session.inbox.first.is_http, client.session.inbox.first.is_raw),
                         (True, True))
        for here, there in ((client, link), (link, client)):
            there.read()
            here.says(self.FRAMES)
            self.assertEqual(there.read(), self.FRAMES)


# ---- 6. isolation

class Killed(BaseException):
    """Stands for kill -9: no handler sees it."""


def deaths(owner, methods, prepare, act):
    """act(prepare()) again and again, Killed at the first, second ... call of these methods of a
    class or module, before it or behind it, until it comes through; yields what was prepared."""
    for after in (False, True):
        for last in itertools.count(1):
            counts, killed, left = itertools.count(1), [], prepare()

            def wrapped(call):
                def called(*arguments, **more):
                    mine = next(counts) == last
                    if killed or mine and not after:
                        killed.append(True)
                        raise Killed
                    result = call(*arguments, **more)
                    if mine:
                        killed.append(True)
                        raise Killed
                    return result
                return called
            with contextlib.ExitStack() as patched:
                for name in methods:
                    call = inspect.getattr_static(owner, name)
                    is_static = isinstance(call, staticmethod)
                    replaced = wrapped(getattr(owner, name))
                    patched.enter_context(mock.patch.object(
                        owner, name, staticmethod(replaced) if is_static else replaced))
                with contextlib.suppress(Killed):
                    act(left)
            yield left
            if not killed:
                break


class VaultCase(unittest.TestCase):
    """What a process has put into a vault, another one finds in it, wherever the first has died."""

    def setUp(self):
        if has.why_no_vault():
            self.skipTest(has.why_no_vault())

    def vault(self):
        return closed_after(self, has.Vault.make())

    def another(self, vault):
        """The same vault as another process has it."""
        return closed_after(self, has.Vault([os.dup(fd) for fd in vault.fds]))

    def pair(self):
        """Two sockets, one of which goes into a vault."""
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        ours.settimeout(5)
        return ours, theirs


class TestRecords(VaultCase):
    """A log of records, the last of each number counts."""

    def test_what_is_written_is_read(self):
        records = self.vault().records
        records.write({0: b"hub", 7: b"seven", 1 << 31: b"\0" * 3000})
        records.write({7: b"", 8: b"eight"})
        records.write({0: b"HUB"})
        self.assertEqual(records.read(), {0: b"HUB", 8: b"eight", 1 << 31: b"\0" * 3000})

    def test_a_death_in_the_middle_of_a_record_costs_that_record(self):
        vault = self.vault()
        vault.records.write({1: b"one", 2: b"two"})
        begin = os.fstat(vault.fds[1]).st_size
        vault.records.write({2: b"second", 3: b"three"})
        whole = has.read_memory_file(vault.fds[1])
        cut = begin + vault.records.HEAD.size + 6
        for size in range(begin, len(whole)):
            for rest in (b"", b"\0" * (len(whole) - size)):    # a page that was not filled yet
                os.ftruncate(vault.fds[1], 0)
                os.pwrite(vault.fds[1], whole[:size] + rest, 0)
                other = self.another(vault).records
                self.assertEqual(other.read(), {1: b"one", 2: b"second" if size >= cut else b"two"})
                other.write({4: b"four"})                       # goes on behind what counts
                self.assertEqual(self.another(vault).records.read()[4], b"four")

    def test_a_death_while_the_log_is_renewed(self):
        count = 0
        for deadly in ("pwrite", "ftruncate"):
            def prepare():
                vault = self.vault()
                vault.records.SLACK, vault.records.PART, vault.written = 2000, 100, -1
                return vault

            def act(vault):
                for number in range(60):
                    vault.records.write({number % 5: b"%d" % number * 40})
                    vault.written = number
            for vault in deaths(has.os, [deadly], prepare, act):
                found = self.another(vault).records.read()
                for number in range(max(0, vault.written - 4), vault.written + 1):
                    newer = {b"%d" % number * 40, b"%d" % (number + 5) * 40}    # not acknowledged
                    self.assertIn(found[number % 5], newer)
                count += 1
        self.assertGreater(count, 100)

    def test_what_goes_while_it_is_renewed(self):
        """Records that are written, or gone, before or behind their copy: each write does a part.
        """
        vault = self.vault()
        records, expected = vault.records, {}
        records.SLACK, records.PART, sizes = 3000, 300, []
        for step in range(400):
            number = step * 7 % 40
            record = b"" if step % 3 == 0 else b"%d" % step * 9
            with mock.patch.object(has.os, "pread", wraps=os.pread) as read:
                records.write({number: record})
            sizes.append(read.call_count)
            expected.pop(number, None)
            if record:
                expected[number] = record
            self.assertEqual(self.another(vault).records.read(), expected)
        self.assertGreater(sum(sizes), 20)
        self.assertLess(max(sizes), 14)

    def test_no_room_for_a_copy_costs_nothing(self):
        vault, real = self.vault(), os.pwrite
        vault.records.SLACK = 1000

        def pwrite(fd, data, at):
            return real(fd, data, at) if fd == vault.fds[1] else 0
        with mock.patch.object(has.os, "pwrite", pwrite):
            for step in range(60):
                with contextlib.suppress(OSError):          # all of it is there all the same
                    vault.records.write({step % 3: b"%d" % step * 40})
                found = self.another(vault).records.read()
                self.assertEqual(found[step % 3], b"%d" % step * 40)
                self.assertEqual(len(found), min(3, step + 1))
        logs = set()
        for step in range(60):
            vault.records.write({step % 3: b"%d" % step * 40})
            logs.add(vault.board[has.Board.LOG])
        self.assertEqual(logs, {0, 1})
        self.assertEqual(len(self.another(vault).records.read()), 3)

    def test_it_does_not_grow_for_ever(self):
        vault = self.vault()
        for number in range(3000):
            vault.records.write({number % 10: bytes(1000)})
        sizes = [os.fstat(fd).st_size for fd in vault.fds[1:3]]
        self.assertLess(max(sizes), has.Records.SLACK + 3 * 10100 + 2000)
        self.assertEqual(min(sizes), 0)

    def test_no_room_costs_nothing_that_was_there(self):
        vault = self.vault()
        vault.records.write({1: b"one"})
        with mock.patch.object(has.os, "pwrite", return_value=5), self.assertRaises(OSError):
            vault.records.write({1: b"two"})
        vault.records.write({2: b"two"})
        self.assertEqual(self.another(vault).records.read(), {1: b"one", 2: b"two"})


class TestShelf(VaultCase):
    """Sockets in flight."""

    def check(self, vault, named):
        """Another process finds these sockets: {name: our end}."""
        other = self.another(vault)
        self.assertTrue(other.shelf.read())
        for name, ours in named.items():
            other.take(name).send(b"here")
            self.assertEqual(ours.recv(9), b"here")
        return other

    def test_a_socket_lives_on_and_reading_changes_nothing(self):
        vault, named = self.vault(), {}
        for _ in range(600):                    # more than one pair takes, one at a time
            ours, theirs = self.pair()
            name = vault.shelf.name(theirs)
            self.assertEqual(name, vault.shelf.name(theirs))
            named[name] = ours
            theirs.close()
        self.assertEqual(len(named), 600)
        for _ in range(2):
            self.check(vault, dict(list(named.items())[-7:]))

    def closed(self, ours, vault=None):
        """Whether our end sees that nobody has the other any more."""
        ours.setblocking(False)
        try:
            return ours.recv(1) == b""
        except BlockingIOError:
            return False

    def test_what_was_dropped_is_let_go(self):
        vault = self.vault()
        (kept, one), pairs = self.pair(), [self.pair() for _ in range(300)]
        name = vault.shelf.name(one)
        for _, theirs in pairs:
            vault.shelf.name(theirs)
        for ours, theirs in pairs:
            theirs.close()
            self.assertFalse(self.closed(ours))
            vault.shelf.drop(theirs)
        for _ in range(3):                      # a step each time
            vault.shelf.tidy()
        self.assertTrue(all(self.closed(ours) for ours, _ in pairs))
        self.check(vault, {name: kept})

    def test_a_name_is_never_used_again(self):
        vault = self.vault()
        (first, one), (second, two), (third, three) = self.pair(), self.pair(), self.pair()
        names = vault.shelf.name(one), vault.shelf.name(two)
        one.close()
        vault.shelf.drop(one)
        other = self.check(vault, {names[1]: second})
        self.assertNotIn(other.shelf.name(three), names)
        with self.assertRaises(KeyError):
            other.take(names[1])                # only once
        other.shelf.leave()                     # what nobody took ends
        self.assertTrue(self.closed(first))

    def test_a_closed_socket_does_not_stop_the_others(self):
        vault = self.vault()
        (kept, one), (_, two) = self.pair(), self.pair()
        name = vault.shelf.name(one)
        vault.shelf.name(two)
        two.close()                             # not dropped yet
        vault.shelf._renew()
        self.check(vault, {name: kept})

    def test_a_death_while_it_is_renewed(self):
        count = 0

        def prepare():
            vault = self.vault()
            pairs = [self.pair() for _ in range(7)]
            vault.named = {vault.shelf.name(theirs): ours for ours, theirs in pairs[:4]}
            vault.shelf._renew()
            vault.named.update({vault.shelf.name(theirs): ours for ours, theirs in pairs[4:]})
            vault.shelf.BATCH = 2
            return vault
        for methods in (["_send"], ["_let_go"]):
            for vault in deaths(has.Shelf, methods, prepare, lambda vault: vault.shelf._renew()):
                self.check(vault, vault.named)
                count += 1
        self.assertGreater(count, 12)

    def test_a_death_while_it_is_renewed_step_by_step(self):
        """Some come and some go meanwhile, and the new ones join the old."""
        count = 0

        def prepare():
            vault = self.vault()
            vault.shelf.BATCH, vault.shelf.YOUNG, vault.named = 2, 3, {}
            vault.pairs = [self.pair() for _ in range(24)]
            return vault

        def act(vault):
            shelf, pairs = vault.shelf, vault.pairs
            for ours, theirs in pairs[:8]:
                vault.named[shelf.name(theirs)] = ours
            shelf._renewal = shelf._renew_in_steps()
            for (ours, theirs), (_, old) in zip(pairs[8:], pairs[:8]):
                vault.named[shelf.name(theirs)] = ours
                vault.named.pop(shelf.name(old))
                shelf.drop(old)
                shelf.tidy()
            self.assertIsNone(shelf._renewal)
            shelf.tidy(at_once=True)
        for methods in (["_send"], ["_let_go"]):
            for vault in deaths(has.Shelf, methods, prepare, act):
                self.check(vault, vault.named)
                count += 1
        self.assertGreater(count, 100)
        self.assertTrue(all(self.closed(ours) for ours, theirs in vault.pairs[:8]
                            if not theirs.close()))

    def test_many_stop_nobody(self):
        """What counts goes over a message at a time, and what is new never waits for all."""
        vault, most, sent = self.vault(), 0, []
        real = has.Shelf._send

        def send(shelf, pair, names):
            sent.append(len(names))
            real(shelf, pair, names)
        vault.shelf.BATCH, vault.shelf.YOUNG = 4, 8
        with mock.patch.object(has.Shelf, "_send", send):
            socks = [self.pair() for _ in range(150)]
            for step in range(3):
                for _, theirs in socks:
                    del sent[:]
                    vault.shelf.name(theirs)
                    most = max(most, sum(sent))
                vault.shelf._renewal = vault.shelf._renew_in_steps()
                for _, theirs in socks:
                    vault.shelf.drop(theirs)
        self.assertLess(most, 20)

    def test_a_limit_of_what_may_be_in_flight(self):
        """Some are not kept, and say so; those that are live on; nothing breaks."""
        vault, real = self.vault(), has.Shelf._send
        flying, limit = [], 10

        def send(shelf, pair, names):
            if sum(len(it) for _, it in flying) + len(names) > limit:
                raise OSError(errno.ETOOMANYREFS, "too many")
            real(shelf, pair, names)
            flying.append((pair, names))

        def drain(pair):
            flying[:] = [it for it in flying if it[0] is not pair]
            real_drain(pair)
        real_drain = has.Shelf._drain
        with mock.patch.object(has.Shelf, "_send", send), \
                mock.patch.object(has.Shelf, "_drain", staticmethod(drain)):
            pairs, named = [self.pair() for _ in range(14)], {}
            for ours, theirs in pairs[:10]:
                named[vault.shelf.name(theirs)] = ours
            with self.assertRaises(OSError):
                vault.shelf.name(pairs[10][1])
            self.check(vault, named)
            for _, theirs in pairs[:2]:         # 2 dead and 8 alive are too many for a moment
                vault.shelf.drop(theirs)
            named = {name: ours for name, ours in named.items()
                     if ours not in (pairs[0][0], pairs[1][0])}
            named[vault.shelf.name(pairs[11][1])] = pairs[11][0]
            named[vault.shelf.name(pairs[12][1])] = pairs[12][0]
            with self.assertRaises(OSError):
                vault.shelf.name(pairs[13][1])
            self.check(vault, named)

    def test_a_table_of_files_that_is_too_small(self):
        import resource
        vault = self.vault()
        for _ in range(50):
            vault.shelf.name(self.pair()[1])
        other, limits = self.another(vault), resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        free = (fd for fd in itertools.count() if not os.path.exists(f"/dev/fd/{fd}"))
        limit = next(itertools.islice(free, 20, None))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
        self.assertFalse(other.shelf.read())
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class TestVault(VaultCase):
    """The whole of it."""

    def test_programs_and_their_trial(self):
        vault = self.vault()

        def program():
            with open(vault.command([])[1], "rb") as file:
                return file.read()
        vault.install(b"one", trial=False)
        self.assertEqual((program(), vault.fall_back(), vault.is_last), (b"one", False, True))
        vault.install(b"second")
        self.assertEqual((program(), vault.is_last, vault.fall_back()), (b"second", False, True))
        self.assertEqual((program(), vault.fall_back()), (b"one", False))
        vault.install(b"3")
        vault.prove()
        self.assertEqual((program(), vault.fall_back()), (b"3", False))

    def test_descriptors_come_and_go_with_it(self):
        before = open_descriptors()
        for _ in range(3):
            with contextlib.closing(has.Vault.make()) as vault:
                self.assertEqual(len(vault.fds), 11)
                self.assertFalse(any(map(os.get_inheritable, vault.fds)))
        with mock.patch.object(has.socket, "socketpair", side_effect=OSError), \
                self.assertRaises(OSError):
            has.Vault.make()
        self.assertEqual(open_descriptors(), before)

    def test_where_the_system_lacks_what_it_needs(self):
        self.addCleanup(has.why_no_vault.cache_clear)
        for name, value, why in (("MEMORY_FILES", False, "no memory files"),
                                 ("SO_PEEK_OFF", 9999, "cannot keep sockets in flight")):
            has.why_no_vault.cache_clear()
            with mock.patch.object(has, name, value):
                self.assertIn(why, has.why_no_vault())


class TakenOver(RigCase):
    """What waits for a timer, or was asked, when the process is replaced, gets its timer and its
    answer again."""

    def test_lines_are_answered_as_unsent(self):
        rig, client, _ = self.player()
        rig.down()
        for count in range(12):
            client.send(f"{count}\r\n")
        rig.settle()
        rig.upgrade()
        rig.pass_time(1.1)
        client.read()
        client.send("hello\r\n")
        rig.pass_time(1.1)
        self.assertEqual(client.lines(), ["# UNSENT hello"])

    def test_arrivals_stay_hidden(self):
        rig = self.rig()
        (alice, _), (_, link) = rig.player("Alice"), rig.player("Bob")
        rig.restart("life 2")
        bob = rig.peers[1]
        for link in (rig.game.accept(), rig.game.accept()):
            rig.let_in(link)
        bob.read()
        rig.upgrade()
        link.says("Alice has connected.\r\nCarol has connected.\r\n")
        self.assertEqual(bob.lines(), ["Carol has connected."])
        rig.pass_time(6)
        link.says("Alice has connected.\r\n")
        self.assertEqual(bob.lines(), ["Alice has connected."])

    def test_sessions_of_one_character_still_wait_for_each_other(self):
        rig = self.rig()
        (first, _), (second, _) = rig.player(), rig.player()
        rig.restart("life 2")
        rig.game.accept(), rig.game.accept()
        rig.upgrade()
        links = rig.game.accept(), rig.game.accept()
        rig.let_in(links[0])
        self.assertEqual([state_of(first), state_of(second)], ["RETURNING"] * 2)

    def test_an_outage_that_began_in_the_process_before(self):
        rig = self.rig()
        with mock.patch.object(has.time, "time", lambda: 1e9 + rig.clock.now):
            rig.player()
            rig.heard("lost", "closed", False)
            rig.pass_time(2)
            rig.upgrade()
            rig.pass_time(1)
            rig.heard("lost", "closed again", False)
            rig.heard("unreachable", HOME, "refused", False)
            rig.pass_time(3.1)
            world = rig.status()["world"]
            self.assertEqual((world["health"], world["since"]), ("down", 6))

    def test_lines_typed_at_a_silent_world(self):
        rig, client, _ = self.player()
        rig.heard("silent")
        client.says("hello\r\n")
        rig.upgrade()
        rig.down()
        self.assertEqual(client.lines(), ["# SILENT", "# OFFLINE", "# UNSENT hello"])

    def test_lines_typed_during_a_return(self):
        rig, client, _ = self.returning()
        client.says("hello\r\n")
        rig.hub.links.clear = lambda: None
        rig.game.close()
        rig.upgrade()
        rig.down()
        self.assertEqual((state_of(client), client.lines()), ("WAITING", ["# UNSENT hello"]))

    def test_a_hold_goes_on(self):
        rig, client, _ = self.player(hold=300)
        rig.down()
        for _ in range(3):
            rig.pass_time(99)
            rig.upgrade()
        rig.pass_time(4)
        self.assertEqual(state_of(client), "CLOSING")

    def test_a_login_being_checked_is_asked_about_again(self):
        rig = self.rig("teenymush")
        rig.found("life 1", checks=True)
        client, link = rig.newcomer()
        client.says("connect Alice pw\r\n")
        link.says("Last connect was from here\r\n")
        self.assertEqual((state_of(client), len(rig.beat.checks)), ("PLAYING", 1))
        rig.upgrade()
        (number, serial, pairs) = rig.beat.checks[1]
        rig.post(rig.hub.on_checked, number, serial, [False])
        self.assertIsNone(client.session.character.login)
        rig.upgrade()
        self.assertEqual(len(rig.beat.checks), 2)

    def test_offers_that_come_late_are_those_of_a_restart(self):
        rig, client, link = self.player()
        link.says(b"\xff\xfd\x1f")
        client.says(b"\xff\xfb\x1f\xff\xfa\x1f\0P\0\x18\xff\xf0")
        rig.restart("life 2")
        link = rig.game.accept()
        rig.let_in(link)
        rig.upgrade()
        client.read()
        for seconds, shown in ((0, b""), (0, b""), (11, b"\xff\xfd\x1f")):
            rig.pass_time(seconds)
            link.says(b"\xff\xfd\x1f")
            self.assertEqual(client.read(), shown)

    def test_answers_that_nobody_waits_for_are_not_awaited_for_ever(self):
        rig, client, link = self.player()
        link.says(b"\xff\xfb\x01")
        client.says(b"\xff\xfd\x01")
        rig.down()                                  # HAS: WONT ECHO; it never answers
        self.assertIn(b"\xff\xfc\x01", client.read())
        self.assertEqual(client.session.telnet.agreement.ignore, {b"\xfe\x01"})
        rig.upgrade()
        rig.pass_time(has.ANSWER_SECONDS + 1)
        rig.found("life 2")
        link = rig.game.accept()
        link.says(b"\xff\xfb\x01")
        rig.let_in(link)
        link.read()
        client.says(b"\xff\xfe\x01")               # its answer to the new world
        self.assertEqual(link.read(), b"\xff\xfe\x01")

    def test_what_waits_for_a_server_that_must_speak_first_is_sent(self):
        folder = new_folder(self)
        rig = self.rig("pennmush", up=False)
        game = closed_after(self, Game(rig.settle, path=folder + "/game.sock"))
        rig.found("life 1", game, has.Address(None, 0, folder + "/game.sock"))
        client = rig.client()
        rig.settle()
        client.says(b"\xff\xfb\x18")
        rig.upgrade()
        link = game.accept()
        self.assertEqual(link.read(), b"203.0.113.9^203.0.113.9\r\n")
        rig.pass_time(2.1)
        self.assertEqual(link.read(), b"\xff\xfb\x18")


class Died(RigCase):
    """kill -9 at any moment: the next process goes on from what was written down."""

    def rig(self, *arguments, **settings):
        if has.why_no_vault():
            self.skipTest(has.why_no_vault())
        return super().rig(*arguments, **settings).keep()

    def talk(self, rig, client, link):
        for here, there in ((client, link), (link, client)):
            there.read()
            here.says("hello\r\n")
            self.assertEqual(there.read(), b"hello\r\n")

    def test_in_each_state(self):
        after = {"BACKOFF": "RETURNING"}
        for column in COLUMNS:
            for deaths_ in (1, 3):
                with self.subTest(column, deaths=deaths_):
                    rig = self.rig()
                    client, link = bring_to(rig, column)
                    client.read()
                    for _ in range(deaths_):
                        rig.die()
                    if column in ("WAITING", "OPENING", "REOPENING"):
                        self.assertEqual(state_of(client), column)
                        continue
                    self.assertEqual(state_of(client), after.get(column, column))
                    self.assertEqual(client.lines(), [])
                    check_consistent(self, rig)
                    if column in ("LOGIN", "PLAYING"):
                        self.talk(rig, client, link)
                    if column == "ASKING":
                        self.assertEqual([it[0] for it in rig.beat.asks],
                                         [client.session.number] * (deaths_ + 1))
                        rig.answer(rig.beat.asks[-1:])
                        self.assertEqual(state_of(client), "CLOSING")
                    if column in ("BACKOFF", "RETURNING"):
                        for _ in range(deaths_ - 1):
                            rig.game.accept()
                        rig.let_in(rig.game.accept())
                        self.assertEqual((state_of(client), client.lines()),
                                         ("PLAYING", ["# ONLINE"]))
                    if column == "CLOSING":
                        rig.pass_time(has.FLUSH_SECONDS + 1)
                        self.assertTrue(is_gone(client))

    def test_a_link_that_is_kept_no_more(self):
        """It ended and was let go, and then HAS died before it wrote down that it had ended."""
        rig = self.rig()
        (alice, link), (bob, other) = rig.player("Alice"), rig.player("Bob")
        with mock.patch.object(rig.hub.scribe, "write"):
            link.hangs_up()
        rig.vault.shelf._renew()
        rig.die()
        self.assertEqual((state_of(alice), state_of(bob)), ("ASKING", "PLAYING"))
        self.talk(rig, bob, other)
        rig.down()
        self.assertEqual((state_of(alice), alice.lines()), ("WAITING", ["# OFFLINE"]))

    def test_closing_is_seen_at_once_though_there_are_copies(self):
        rig = self.rig()
        for how in ("quit", "world ends", "client ends"):
            client, link = rig.player()
            if how == "quit":
                client.session.end()
                rig.settle()
            elif how == "world ends":
                client.says("QUIT\r\n")
                link.hangs_up()
            else:
                client.hangs_up()
                rig.pass_time(has.FLUSH_SECONDS + 1)
            (link if how == "client ends" else client).read()
            self.assertTrue((link if how == "client ends" else client).ended, how)

    def test_what_ended_does_not_come_back(self):
        rig = self.rig()
        clients = [rig.player(f"U{number}")[0] for number in range(6)]
        for client in clients[1:]:
            client.session.end()
        rig.settle()
        rig.die()
        self.assertEqual(list(rig.hub.sessions), [clients[0].session.number])
        newcomer = rig.client()
        self.assertGreater(newcomer.session.number, clients[-1].session.number)

    def test_who_has_quit_is_not_brought_back(self):
        for waits in (False, True):
            with self.subTest(waits=waits):
                rig, client, link = self.player()
                if waits:
                    rig.down()
                client.says("QUIT\r\n")
                if not waits:
                    link.hangs_up()
                self.assertEqual(state_of(client), "CLOSING")
                rig.die()
                if not waits:
                    rig.down()
                rig.found("life 2")
                self.assertEqual(state_of(client), "CLOSING")
                rig.pass_time(has.FLUSH_SECONDS + 1)
                self.assertTrue(is_gone(client))
                self.assertFalse(rig.hub.sessions)

    def test_what_had_ended_before_that_was_written_down(self):
        """The next process finds a name of no socket: nobody else suffers, nor does his place."""
        rig = self.rig(reattach=300, local_port=0)
        rig.hub.door.listen()
        port = rig.hub.door.listeners[0].sock.getsockname()[1]
        names = "Alice", "Bob", "Carol"
        players = [rig.player(name, tcp=True) for name in names]
        shelf = rig.vault.shelf
        with mock.patch.object(has.Scribe, "write"):
            players[0][1].sock.close()                  # his link
            players[1][0].reset()                       # his line
            rig.settle()
            rig.hub.door.listeners[0].close()
            shelf.tidy(at_once=True)
            shelf._renew()
        with mock.patch.object(has, "open_listeners", return_value=[
                socket.create_server(("127.0.0.1", port))]), \
                mock.patch.object(has.log, "exception") as exception:
            rig.die()
        self.assertFalse(exception.called)
        self.assertEqual([it.sock.getsockname()[1] for it in rig.hub.door.listeners], [port])
        self.assertEqual([(it.character.login.name.decode(), it.state.name)
                          for it in rig.hub.sessions.values()],
                         [("Alice", "ASKING"), ("Bob", "PLAYING"), ("Carol", "PLAYING")])
        self.assertEqual(len(rig.hub.places), 1)
        self.talk(rig, *players[2])

    def test_a_heartbeat_that_had_ended_before_that_was_written_down(self):
        ours, theirs = socket.socketpair()
        theirs.close()
        parked = {"connection": {"fd": 7, "x": 1}}
        theirs, mine = has.take_parked(parked, {}.__getitem__)
        self.addCleanup(mine["connection"]["fd"].close)
        with socket.socket(fileno=theirs["connection"]["fd"]) as sock:
            self.assertEqual(sock.recv(1), b"")
        ours.close()

    def test_a_mark_that_comes_after_the_death_is_not_shown(self):
        rig, client, link = self.newcomer()
        client.says("connect Alice pw\r\n")
        asked = link.read()
        rig.die()
        link.says(b"Welcome\r\n" + re.search(rb"OUTPUTPREFIX (=\w+=)\r\n", asked).group(1)
                  + b"\r\n")
        self.assertEqual((state_of(client), client.read()), ("PLAYING", b"Welcome\r\n"))

    def test_a_change_of_password_that_was_not_answered_is_tried_too(self):
        """The world died of it, or HAS had read the answer and died."""
        for dies, late in ((False, 0), (True, 0), (True, 40)):
            with self.subTest(dies=dies, late=late):
                rig, client, link = self.player()
                client.says("@password pw=new\r\n")
                if dies:
                    rig.die()
                if late:
                    rig.pass_time(late)
                    link.says("text\r\n")
                rig.restart("life 2")
                rig.let_in(rig.game.accept(), None)
                link = rig.game.accept()
                rig.settle()
                self.assertIn(b"connect Alice new\r\n", link.sock.recv(999, socket.MSG_PEEK))
                rig.let_in(link)
                self.assertEqual((state_of(client), client.lines()[-1]), ("PLAYING", "# ONLINE"))
                self.assertEqual(client.session.character.login.password, b"new")

    def test_who_is_back_is_not_waited_for(self):
        """The history is written down now and then; who came back or left since is known."""
        rig = self.rig()
        players = [rig.player(name, tcp=True) for name in ("Alice", "Bob", "Carol", "Dora")]
        rig.restart("life 2")
        links = [rig.game.accept() for _ in players]
        for link in links[:3]:
            rig.let_in(link)
        players[1][0].reset()
        rig.settle()
        with mock.patch.object(has.Scribe, "write"):
            links[2].hangs_up()                       # the world dies again: not told yet
        rig.die()
        told = rig.hub.history.told()
        outage = told["outages"][-1]
        self.assertEqual((told["waiting"], outage["back"], outage["absent"]),
                         (["Carol", "Dora"], 1, [["Bob", "the client left"]]))

    def test_a_login_is_not_lost_wherever_it_dies(self):
        """What comes at the login screen is taken when it is written down."""
        count = 0

        def prepare():
            rig = self.rig()
            rig.alice = rig.client()
            rig.link = rig.game.accept()
            rig.asked = b""
            return rig

        def act(rig):
            rig.alice.says("connect Alice pw\r\n")
            self.answer(rig)
        for rig in deaths(has.Scribe, ["write"], prepare, act):
            count += 1
            rig.die()
            self.answer(rig)
            self.assertEqual(state_of(rig.alice), "PLAYING")
            self.assertEqual(rig.asked.count(b"connect Alice pw"), 1)
            self.assertIn(b"Welcome", rig.alice.read())
        self.assertGreater(count, 5)

    def test_what_is_typed_in_an_outage_is_not_lost_wherever_it_dies(self):
        """A login is tried on return; a line is answered as unsent, or sent."""
        for column in ("WAITING", "REOPENING", "RETURNING"):
            self.typed_while(column)

    def typed_while(self, column):
        count = 0

        def prepare():
            rig = self.rig()
            rig.alice, rig.link = bring_to(rig, column)
            rig.bob = rig.client() if column == "WAITING" else None
            return rig

        def act(rig):
            rig.alice.send("say one\r\n")
            if rig.bob:
                rig.bob.send("connect Bob pw\r\n")
            rig.settle()
        for rig in deaths(has.Scribe, ["write"], prepare, act):
            count += 1
            rig.die()
            rig.pass_time(1.1)
            self.assertIn(b"say one", rig.alice.read() + rig.alice.session.inbox.kept)
            if rig.bob:
                self.assertEqual(rig.bob.session.character.pending.name, b"Bob")
        self.assertGreater(count, 2)

    def answer(self, rig):
        """The world answers the login, once."""
        answered, rig.asked = rig.asked, rig.asked + rig.link.read()
        if rig.asked and not answered:
            mark = re.search(rb"OUTPUTPREFIX (=\w+=)\r\n", rig.asked).group(1)
            rig.link.says(b"Welcome\r\n" + mark + b"\r\n")

    def test_a_client_just_accepted_is_let_in_by_the_next(self):
        for place in "on_accept", "on_client":
            self.accepted_and_killed(place)

    def accepted_and_killed(self, place):
        rig = self.rig()
        rig.hub.door.listen()
        rig.settle()
        known, address = set(rig.hub.sessions), rig.hub.door.listeners[0].sock.getsockname()
        client = closed_after(self, socket.create_connection(address))
        with mock.patch.object(has.Door, place, side_effect=Killed), self.assertRaises(Killed):
            rig.settle()
        gone = socket.create_connection(address)
        gone.close()
        rig.die()
        rig.pass_time(1)
        self.assertEqual([it.state.name for number, it in rig.hub.sessions.items()
                          if number not in known], ["LOGIN"])
        link = rig.game.accept()
        link.says("Hello\r\n")
        client.settimeout(5)
        self.assertEqual(client.recv(99), b"Hello\r\n")

    def test_a_login_whose_answer_the_dead_has_read_is_tried_on_return(self):
        rig, client, _ = self.newcomer()
        client.says("connect Alice pw\r\n")
        rig.die()
        rig.pass_time(40)
        rig.restart("life 2")
        rig.let_in(rig.game.accept())
        self.assertEqual(state_of(client), "PLAYING")

    def test_nothing_is_sent_twice_wherever_it_dies(self):
        """A paste too long for one turn: what was read in the turn of the death is lost at most."""
        lines, count = [f"line {number:03}" for number in range(130)], 0
        a_read, many = (has.LOOK_BYTES - 1) // len("line 000\r\n") + 1, 0

        def prepare():
            rig = self.rig()
            rig.alice, rig.link = rig.player()
            return rig

        def act(rig):
            rig.alice.says("\r\n".join(lines) + "\r\n")
        for rig in deaths(has.Scribe, ["write"], prepare, act):
            count += 1
            rig.die()
            got = rig.link.lines()
            self.assertEqual(got, [line for line in lines if line in got])
            lost = len(lines) - len(got)
            self.assertLessEqual(lost, a_read)
            many += lost > has.PATIENCE         # it died when it had just read them
        self.assertGreater(count, 6)
        self.assertEqual(many, len(lines) // a_read + (len(lines) % a_read > has.PATIENCE))

    def test_lines_typed_during_a_return_are_sent_once_wherever_it_dies(self):
        count = 0

        def prepare():
            rig = self.rig()
            rig.alice, rig.link = rig.returning()
            rig.alice.says("one\r\ntwo\r\nthree\r\n")
            return rig

        def act(rig):
            rig.let_in(rig.link)
            for _ in range(4):
                rig.link.says("answer\r\n")
        for rig in deaths(has.Scribe, ["write"], prepare, act):
            count += 1
            got = rig.link.lines()
            rig.die()
            if state_of(rig.alice) == "RETURNING":
                rig.link = rig.game.accept()
                rig.let_in(rig.link)
            rig.pass_time(1, 1, 1)
            got = [line for line in got + rig.link.lines() if line in ("one", "two", "three")]
            lines = [*dict.fromkeys(got)]
            self.assertEqual(got, [line for line in ("one", "two", "three") if line in lines])
            self.assertGreaterEqual(len(got), 2)
        self.assertGreater(count, 6)

    def test_a_place_of_one_who_is_away_is_kept(self):
        rig, client, link = self.player(tcp=True, reattach=300)
        client.reset()
        rig.settle()
        link.says("missed\r\n")
        rig.pass_time(has.Scribe.LOOK_SECONDS + 1)
        rig.die()
        link.says("missed too\r\n")
        again = rig.client(tcp=True)
        again.says("connect Alice pw\r\n")
        rig.pass_time(*[0.3] * 20)
        self.assertIn(b"missed\r\nmissed too\r\n", again.read())
        link.read()
        again.says("hello\r\n")
        self.assertEqual(link.read(), b"hello\r\n")

    def test_who_takes_his_place_in_an_outage_is_heard_once(self):
        rig, client, _ = self.player(tcp=True, reattach=300)
        client.reset()
        rig.settle()
        rig.down()
        again = rig.client(tcp=True)
        again.send("connect Alice pw\r\n")
        rig.pass_time(*[0.3] * 20)
        self.assertIn(b"Welcome back", again.read())
        again.send("say one\r\n")
        rig.pass_time(*[0.3] * 20)
        self.assertEqual(again.lines(), ["# UNSENT say one"])
        rig.die()
        rig.pass_time(1.1)
        self.assertEqual(again.lines(), [])

    def test_what_was_typed_meanwhile_is_not_lost_by_the_next_death(self):
        lines, count = [f"line {number}" for number in range(60)], 0

        def prepare():
            rig, rig.alice, rig.link = self.player()
            with mock.patch.object(rig, "settle", lambda: None):
                rig.alice.send("\r\n".join(lines) + "\r\n")
                rig.die()
            return rig
        for rig in deaths(has.Session, ["refresh"], prepare, lambda rig: rig.settle()):
            count += 1
            rig.die()
            got = rig.link.lines()
            self.assertEqual(got, [line for line in lines if line in got])
            self.assertLessEqual(len(lines) - len(got), has.PATIENCE)
        self.assertGreater(count, 6)
        self.assertIsNone(rig.alice.session.inbox.forward)
        rig.alice.says("slow\r\n")
        self.assertTrue(rig.alice.session.inbox.forward)

    def test_a_link_that_was_given_up_is_no_sign_that_he_left(self):
        """The world is silent for too long, and lives on: whoever closed its links."""
        count = 0

        def prepare():
            rig, rig.alice, rig.link = self.player()
            return rig
        for rig in deaths(has.Stream, ["drop"], prepare, lambda rig: rig.down()):
            count += 1
            rig.die()
            rig.answer(rig.beat.asks)
            self.assertIn(state_of(rig.alice), ("PLAYING", "WAITING", "RETURNING"))
        self.assertGreater(count, 2)

    def test_who_comes_back_to_his_place_stays_wherever_it_dies(self):
        count = 0

        def prepare():
            rig, client, rig.link = self.player(tcp=True, reattach=300)
            client.reset()
            rig.settle()
            rig.again = rig.client(tcp=True)
            rig.own = rig.game.accept()
            return rig

        def act(rig):
            rig.again.send("connect Alice pw\r\n")
            rig.pass_time(*[0.1] * 30)
        for owner, method in (has.Scribe, "write"), (has.Stream, "drop"):
            for rig in deaths(owner, [method], prepare, act):
                count += 1
                rig.die()
                rig.answer(rig.beat.asks)
                rig.pass_time(*[0.1] * 150)
                states = [it.state.name for it in rig.hub.sessions.values()]
                if "LOGIN" in states:                   # he sees that, and tries it again
                    act(rig)
                else:
                    self.assertEqual(states, ["PLAYING"])
                rig.again.read()
                self.assertFalse(rig.again.ended)
                rig.link.read()
                rig.again.says("hello\r\n")
                self.assertEqual(rig.link.read(), b"hello\r\n")
        self.assertGreater(count, 6)

    def test_a_login_that_waits_for_a_place_goes_on(self):
        rig, client, _ = self.player(tcp=True, reattach=300)
        rig.found("life 1", checks=True)
        client.reset()
        rig.settle()
        again = rig.client(tcp=True)
        again.says("connect Alice pw\r\n")
        self.assertEqual(len(rig.beat.checks), 1)       # the answer comes to the next process
        rig.die()
        self.assertEqual(len(rig.beat.checks), 2)
        number, serial, pairs = rig.beat.checks[-1]
        rig.post(rig.hub.on_checked, number, serial, [True])
        rig.pass_time(*[0.1] * 30)
        self.assertEqual((len(rig.hub.places), len(rig.hub.sessions)), (0, 1))
        self.assertIn(b"Welcome back", again.read())

    def test_listeners_and_world_are_known(self):
        rig = self.rig(local_port=0)
        rig.hub.door.listen()
        rig.settle()
        address = rig.hub.door.listeners[0].sock.getsockname()
        rig.die()
        self.assertEqual(rig.hub.door.listeners[0].sock.getsockname(), address)
        self.assertEqual(rig.hub.world.life, "life 1")
        for listener in rig.hub.door.listeners:
            listener.close()
        rig.hub.door.listeners = []
        rig.hub.changed.add(rig.hub)
        rig.settle()
        with socket.create_server(address):     # free at once
            pass

    def test_what_is_full_or_faulty_stops_nobody(self):
        rig = self.rig()
        (alice, link), (bob, other) = rig.player("Alice"), rig.player("Bob")
        for fault in (OSError(errno.ETOOMANYREFS, "too many"), ValueError("planted")):
            with mock.patch.object(has.Shelf, "name", side_effect=fault), \
                    self.assertLogs("has", "ERROR") as logged:
                carol, link = rig.player("Carol")
                self.talk(rig, carol, link)
            self.assertTrue(logged.output)
            carol.session.end()
        rig.die()
        self.assertEqual(len(rig.hub.sessions), 2)
        self.talk(rig, bob, other)

    def test_what_is_packed_is_what_is_watched(self):
        """Nothing survives whose change is not seen, but for what is PASSING."""
        rig, client, _ = self.player()
        for part in has.Passage(client.session).parts:
            self.assertLessEqual(set(part.PASSING), set(part.SURVIVES))
        session, draft = client.session, has.Draft(client.session)

        def seen():
            return draft.update(lambda sock: 1)
        self.assertTrue(seen())
        self.assertIsNone(seen())
        whole = has.Passage(session).pack(lambda sock: 1, held=False)
        self.assertEqual(json.loads(has.Draft(session).update(lambda sock: 1)),
                         json.loads(json.dumps(whole)))
        changes = [lambda: session.inbox.typed.lines(session.dialect, b"x").__next__(),
                   lambda: session.screen.notices.append(("x", b"")),
                   lambda: session.character.unanswered.append((session.character.login, 1, True)),
                   lambda: session.character.trials.append(session.character.login),
                   lambda: session.telnet._agree(),
                   lambda: session.telnet.agreement.from_client(b"\xff\xfb\x1f"),
                   lambda: setattr(session.hold, "silent", True),
                   lambda: session.feed.proof.retire()]
        for number, change in enumerate(changes):
            with contextlib.suppress(StopIteration):
                change()
            self.assertTrue(seen(), number)
            self.assertIsNone(seen())


class NothingIsAskedTwice(RigCase):
    def test_what_was_asked_for_a_return_is_not_asked_again_in_a_new_process(self):
        rig, client, _ = self.player()
        rig.down()
        character = client.session.character
        character.previous = has.Credentials(b"connect", b"Alice", b"older")
        rig.found("life 2", checks=True)
        (number, serial, pairs), = rig.beat.checks
        self.assertEqual(len(pairs), 2)
        rig.post(rig.hub.on_checked, number, serial, [True, False])
        rig.let_in(rig.game.accept())
        self.assertEqual(state_of(client), "PLAYING")
        rig.beat.checks.clear()
        rig.upgrade()
        self.assertEqual(rig.beat.checks, [])


UNVERIFIED = has.Recipe("world", {"mush_ssl_verify": False, "mush_ssl_ca": ""}, {})


class TLSCase(RigCase):
    """A HAS with a TLS port, and the process that speaks it as a loop in this process."""

    def rig(self, *arguments, **settings):
        cert, key = certificate_of_all()
        return super().rig(*arguments, **{"local_port_ssl": 4999, "ssl_cert": cert, "ssl_key": key,
                                          **settings})

    def world_in_tls(self, rig):
        """From now on links are in TLS."""
        rig.game.close()
        rig.game = Game(rig.settle, secure=True)
        rig.found("life 1", tls=UNVERIFIED)

    def talk(self, rig, *pairs):
        for client, link in pairs:
            for here, there in ((client, link), (link, client)):
                there.read()
                here.says("hello\r\n")
                self.assertEqual(there.read(), b"hello\r\n")

    @staticmethod
    def tunnel(rig, front=0):
        """The newest one of the process that speaks TLS."""
        return list(rig.fronts[front].tunnels.values())[-1]


class InTLS(TLSCase):
    """What users see whose connections, or links, are in TLS."""

    def clogged(self):
        """(rig, client): one who reads nothing of all that the world has sent, as much as goes."""
        rig, client, link = self.player(tls=True)
        with contextlib.suppress(BlockingIOError):
            for _ in range(4000):
                link.sock.send(b"x" * 65536)
                rig.settle()
        return rig, client

    def test_all_that_is_sent_arrives_in_order(self):
        rig = self.rig()
        self.world_in_tls(rig)
        client, link = rig.player(tls=True)
        self.talk(rig, (client, link))
        text = b"".join(b"%d\r\n" % number for number in range(100000))
        for here, there in ((client, link), (link, client)):
            came = b""
            for start in range(0, len(text), 50000):
                here.says(text[start:start + 50000])
                came += there.read()
            self.assertEqual(came, text)

    def test_a_client_that_does_not_read_costs_only_itself(self):
        rig, client, link = self.player(tls=True)
        other = rig.player("Bob", tls=True)
        sent, tunnel = 0, list(rig.fronts[0].tunnels.values())[0]
        for _ in range(400):
            try:
                sent += link.sock.send(b"%06d\r\n" % sent * 8192)
            except BlockingIOError:
                break
            rig.settle()
            self.assertLess(len(tunnel.line.out), 2 * has.TLS_RECORD)
        self.assertTrue(client.session.client.full)
        self.talk(rig, other)
        check_consistent(self, rig)
        read, quiet = 0, 0
        while quiet < 20:
            size = len(client.read())
            read, quiet = read + size, 0 if size else quiet + 1
            rig.settle()
        self.assertEqual(read, sent)

    def test_a_world_that_does_not_read_holds_up_only_who_types(self):
        rig, client, link = self.player(tls=True)
        other = rig.player("Bob", tls=True)
        tunnel = list(rig.fronts[0].tunnels.values())[0]
        with contextlib.suppress(BlockingIOError):
            for _ in range(4000):
                client.says(b"x" * 9999 + b"\n")
                self.assertLess(len(tunnel.plain.out), 2 * has.TLS_RECORD)
        self.assertTrue(tunnel.plain.full)
        self.talk(rig, other)

    def test_every_end(self):
        """(how the client ends, how the log has it)"""
        for end, reason in (
                (lambda client: client.reset(), r" \(Connection reset by peer\)"),
                (lambda client: client.sock.close(), ""),
                (lambda client: client.notify(), ""),
                (lambda client: client.sock.sendall(b"garbage" * 10), r" \(TLS: .*\)")):
            rig = self.rig()
            with self.subTest(reason), self.assertLogs(has.log, "INFO") as logged:
                client, link = rig.player(tls=True)
                end(client)
                rig.settle()
                rig.pass_time(11)
                rig.settle(lambda: not rig.fronts[0].tunnels)
                link.read()
                self.assertEqual((link.ended, state_of(client)), (True, "gone"))
                self.assertRegex(logged.output[-1], rf": the client has left{reason}$")

    def test_a_client_that_has_said_its_last_words_is_answered(self):
        for end in (lambda client: client.sock.shutdown(socket.SHUT_WR),
                    lambda client: client.notify()):
            rig, client, link = self.player(tls=True)
            client.send("say bye\r\n")
            end(client)
            rig.settle()
            self.assertEqual(link.read(), b"say bye\r\n")
            link.send("You say bye\r\n")
            link.hangs_up()
            self.assertEqual(client.read(), b"You say bye\r\n")
            rig.pass_time(11)
            client.read()
            self.assertEqual((client.was_notified, client.ended, len(rig.fronts[0].tunnels)),
                             (True, True, 0))

    def test_a_world_still_answers_what_was_sent_last(self):
        """close_notify would make it deaf, so it is sent only when nobody reads any more."""
        rig = self.rig()
        self.world_in_tls(rig)
        client, link = rig.player()
        client.send("say bye\r\n")
        client.sock.shutdown(socket.SHUT_WR)
        rig.settle()
        self.assertEqual((link.read(), link.was_notified, link.ended),
                         (b"say bye\r\n", False, True))
        link.says("You say bye\r\n")
        self.assertEqual(client.read(), b"You say bye\r\n")

    def test_goodbye(self):
        rig = self.rig(local_port_ssl=free_port())
        if not has.why_no_vault():
            rig.keep()
        rig.hub.door.listen()
        client, _ = rig.player(tls=True)
        rig.player("Bob", tls=True)
        ended = has.KnownFront.on_channel_end

        def on_channel_end(known):
            ended(known)
            for _ in range(2):                  # something else has changed just then
                rig.hub.changed.add(rig.hub)
                rig.hub.write_down()
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(
                has.KnownFront, "on_channel_end", on_channel_end), \
                self.assertLogs(has.log) as logged:
            rig.hub.control.open(folder + "/has.sock")
            rig.hub.stop()
            rig.settle()
            self.assertFalse(rig.hub.fronts.are_done)
            rig.pass_time(*[0.1] * 5)
            self.assertIn(b"going down", client.read())
            self.assertTrue(client.was_notified and client.ended)
            rig.settle(lambda: not rig.fronts)
        rig.hub.door.listeners = []             # they are closed
        self.assertEqual([line for line in logged.output if not line.startswith("INFO")], [])
        self.assertTrue(rig.hub.fronts.are_done)
        self.assertEqual(rig.hub.fronts.all, [])

    def test_nobody_waits_for_one_who_does_not_read_the_goodbye(self):
        rig, client = self.clogged()
        rig.hub.stop()
        rig.pass_time(*[0.5] * 9)
        self.assertTrue(rig.hub.fronts.are_done)
        self.assertTrue(rig.fronts)             # it goes on by itself
        rig.pass_time(*[1] * 13)
        self.assertEqual(rig.fronts, [])

    def test_one_that_does_not_read_is_closed_nonetheless(self):
        rig, client = self.clogged()
        client.session.end()
        rig.pass_time(*[1] * 16)
        self.assertEqual(len(rig.fronts[0].tunnels), 0)

    def test_a_fault_ends_one_connection(self):
        rig = self.rig()
        alice, bob = rig.player("Alice", tls=True), rig.player("Bob", tls=True)
        tunnel = self.tunnel(rig)
        tunnel._from_line = tunnel.line.on_data = lambda data: 1 / 0
        with self.assertLogs(has.log) as logged:
            bob[0].says("x\r\n")
        self.assertIn("client from 203.0.113.9 in TLS: a fault of HAS", logged.output[0])
        self.assertIn("the client has left (a fault of HAS)", logged.output[-1])
        self.assertEqual((state_of(bob[0]), state_of(alice[0])), ("gone", "PLAYING"))
        self.talk(rig, alice)

    def test_idle_connections_cause_no_events(self):
        rig = self.rig()
        self.world_in_tls(rig)
        rig.player(tls=True)
        NoSpinning.assert_idle(self, rig)

    def test_a_link_that_is_given_up_leaves_nothing(self):
        """Before it is connected, and in the middle of its handshake."""
        for full in (True, False):
            rig = self.rig()
            rig.found("life 1", rig.full if full else rig.game, tls=UNVERIFIED)
            client = rig.client()
            client.hangs_up()
            rig.settle(lambda: not rig.fronts[0].tunnels)
            known, = rig.hub.fronts.all
            self.assertEqual((known.fars, known._opening), ({}, {}))

    def test_nothing_is_left_behind(self):
        rig = self.rig()
        self.world_in_tls(rig)
        rig.player("Bob", tls=True)
        counts = set()
        for _ in range(3):
            client, link = rig.player(tls=True)
            client.sock.close()
            link.hangs_up()
            rig.pass_time(11)
            self.assertEqual(len(rig.fronts[0].tunnels), 2)
            counts.add((open_descriptors(), len(rig.hub.fronts.all[0].fars)))
        self.assertEqual(len(counts), 1, counts)


class HandshakesOfTLS(TLSCase):
    """Who is not let in yet: bounded, and none for long."""

    def arrive(self, rig, host="198.51.100.7"):
        ours, theirs = tcp_pair()
        rig.peers.append(Peer(ours, rig.settle))
        rig.hub.door.on_accept(theirs, host, True)
        rig.settle()
        return rig.peers[-1]

    def test_silent_ones_make_room(self):
        rig = self.rig(max_clients=100, max_per_host=20)
        silent = [self.arrive(rig, f"198.51.100.{number}") for number in range(130)]
        ended = [peer.read() is not None and peer.ended for peer in silent]
        self.assertEqual(ended, [True] * 30 + [False] * 100)
        of_one = [self.arrive(rig) for _ in range(30)]
        ended = [peer.read() is not None and peer.ended for peer in of_one]
        self.assertEqual(ended, [True] * 10 + [False] * 20)
        self.assertEqual(len(rig.fronts[0].tunnels), 100)
        self.talk(rig, rig.player(tls=True))
        rig.pass_time(*[1] * 11)
        self.assertEqual((len(rig.fronts[0].tunnels), len(rig.hub.sessions)), (1, 1))

    def test_why_is_said(self):
        for data, why in ((b"GET / HTTP/1.0\r\n\r\n", "TLS handshake failed: HTTP_REQUEST"),
                          (b"connect Alice alicepw\r\n", "TLS handshake failed: .*"),
                          (None, "TLS handshake failed: .*EOF.*"), (b"", "no TLS handshake")):
            rig = self.rig()
            with self.subTest(data), self.assertLogs(has.log) as logged:
                peer = self.arrive(rig)
                if data is None:
                    peer.sock.close()
                else:
                    peer.send(data)
                rig.settle()
                rig.pass_time(*[1] * 11)
            self.assertRegex(logged.output[-1], f"client from 198.51.100.7 .*{why}")
            self.assertEqual(len(rig.fronts[0].tunnels), 0)

    def test_a_link_that_cannot_be_had(self):
        """Refused, no TLS there, a certificate that is not believed."""
        cert, _ = certificate_of_all()
        refused = socket.socket()
        refused.bind(("127.0.0.1", 0))
        self.addCleanup(refused.close)
        for secure, verify, why in ((None, False, "Connection refused"),
                                    (False, False, "TLS handshake failed: .*"),
                                    (True, True, "CERTIFICATE_VERIFY_FAILED: self.signed")):
            rig = self.rig()
            rig.game.close()
            rig.game = Game(rig.settle, secure=bool(secure))
            tls = has.Recipe("world", {"mush_ssl_verify": verify, "mush_ssl_ca": ""}, {})
            world = rig.hub.world._replace(tls=tls, target=rig.game.target)
            if secure is None:
                world = world._replace(target=(socket.AF_INET, refused.getsockname()))
            rig.heard("found", world)
            with self.subTest(why), self.assertLogs(has.log, "DEBUG") as logged:
                client = rig.client()
                if secure is not None:
                    peer = rig.game.accept()
                    peer.sock.sendall(b"Welcome\r\n" * (not secure))
                    with contextlib.suppress(ssl.SSLError):
                        rig.settle(lambda: peer.read() and False or peer.ended)
                rig.settle(lambda: "link failed" in "".join(logged.output))
                self.assertRegex("\n".join(logged.output), f"link failed: .*{why}")
                self.assertFalse(client.session.linked)

    def test_a_certificate_that_could_not_be_handed_over(self):
        rig = self.rig()
        with mock.patch.object(has.Recipe, "context", side_effect=ValueError("no such pair")), \
                self.assertLogs(has.log) as logged:
            peer = self.arrive(rig)
            peer.read()
        self.assertTrue(peer.ended)
        self.assertIn("no such pair", logged.output[-1])

    def test_more_than_may_be_open(self):
        """In the process that speaks TLS."""
        rig = self.rig()
        ours, theirs = tcp_pair()
        peer = TLSPeer(ours, rig.settle)
        rig.peers.append(peer)
        rig.hub.door.on_accept(theirs, "198.51.100.7", True)
        rig.hub.turn(0)
        with mock.patch.object(socket, "socketpair", side_effect=OSError(
                errno.EMFILE, os.strerror(errno.EMFILE))), self.assertLogs(has.log) as logged:
            rig.shake_hands(peer)
        self.assertIn("Too many open files", logged.output[-1])
        self.assertEqual(len(rig.fronts[0].tunnels), 0)
        self.talk(rig, rig.player(tls=True))


class FrontsOfTLS(TLSCase):
    """The process that speaks TLS outlives the worker, and what outlives it."""

    def setUp(self):
        if has.why_no_vault():
            self.skipTest(has.why_no_vault())

    def test_the_worker_is_killed(self):
        """Again and again: users in TLS notice nothing, nor does a link in TLS."""
        rig = self.rig().keep()
        self.world_in_tls(rig)
        alice, bob = rig.player(tls=True), rig.player("Bob")
        sizes = set()
        for _ in range(5):
            rig.die()
            self.talk(rig, alice, bob)
            sizes.add(open_descriptors())
        self.assertEqual((len(rig.fronts), len(rig.hub.fronts.all), len(sizes)), (1, 1, 1))
        alice[0].says("QUIT\r\n")
        alice[1].sock.close()
        rig.settle(lambda: state_of(alice[0]) == "CLOSING")
        alice[0].read()
        self.assertTrue(alice[0].was_notified)

    def test_what_comes_while_nobody_lives(self):
        """A handshake, typed text and text of the world, an end: the next worker hears of all."""
        rig = self.rig().keep()
        alice, link = rig.player(tls=True)
        bob, bobs = rig.player("Bob", tls=True)
        ours, theirs = tcp_pair()
        late = TLSPeer(ours, rig.settle)
        rig.peers.append(late)
        rig.hub.door.on_accept(theirs, "198.51.100.7", True)
        front, turn = rig.fronts[0], rig.hub.turn
        rig.hub.turn = lambda longest=None: None                # it hangs
        rig.shake_hands(late)
        alice.send("say x\r\n")
        link.send("text\r\n")
        bob.reset()
        rig.settle()
        self.assertTrue(late.is_open)
        with self.assertLogs(has.log) as logged:
            rig.die()
        self.assertIn("has left (Connection reset by peer)", "\n".join(logged.output))
        self.assertEqual((link.read(), alice.read()), (b"say x\r\n", b"text\r\n"))
        self.assertEqual(state_of(bob), "gone")
        rig.game.accept()
        self.assertEqual(list(rig.hub.sessions.values())[-1].host, "198.51.100.7")
        self.assertEqual(len(front.tunnels), 2)

    def test_a_worker_that_dies_of_letting_one_in(self):
        """Before that was written down he is given to the next one; but not for ever."""
        for deaths in (2, 3):
            rig = self.rig().keep()
            others = rig.player(tls=True)
            ours, theirs = tcp_pair()
            late = TLSPeer(ours, rig.settle)
            late.send("WHO\r\n")               # it is not lost with the worker
            rig.peers.append(late)
            rig.hub.door.on_accept(theirs, "198.51.100.7", True)
            with mock.patch.object(has.Door, "on_client", side_effect=Killed):
                self.assertRaises(Killed, rig.shake_hands, late)
                for _ in range(deaths - 1):
                    self.assertRaises(Killed, rig.die)
            rig.die()
            self.talk(rig, others)
            rig.shake_hands(late)
            self.assertEqual((len(rig.hub.sessions), late.ended), (4 - deaths, deaths > 2))
            if deaths == 2:
                self.assertEqual(rig.game.accept().read(), b"WHO\r\n")

    def test_a_worker_that_dies_when_it_has_written_one_down(self):
        rig = self.rig().keep()
        send = has.Channel.send

        def dies(channel, message, *more):
            if message.get("do") == "taken":
                raise Killed
            send(channel, message, *more)
        ours, theirs = tcp_pair()
        client = TLSPeer(ours, rig.settle)
        rig.peers.append(client)
        rig.hub.door.on_accept(theirs, "198.51.100.7", True)
        with mock.patch.object(has.Channel, "send", dies):
            self.assertRaises(Killed, rig.shake_hands, client)
        rig.die()
        link = rig.game.accept()
        self.talk(rig, (client, link))
        client.send("QUIT\r\n")
        rig.settle()
        link.hangs_up()
        client.read()
        self.assertTrue(client.was_notified)
        self.assertEqual([len(rig.hub.sessions), len(rig.game.peers)], [1, 1])

    def test_it_needs_no_file(self):
        options = has.parse_arguments(["--script", "/no/has.py", "--config", "/no/has.conf",
                                       "--front", "7"])
        self.assertEqual(options.front, 7)

    def test_another_program(self):
        rig = self.rig()
        alice = rig.player(tls=True)
        rig.upgrade()
        self.assertEqual(len(rig.fronts), 1)
        rig.program = 2
        rig.upgrade()
        self.assertEqual(len(rig.fronts), 2)
        self.talk(rig, alice)
        bob = rig.player("Bob", tls=True)
        self.assertEqual([len(front.tunnels) for front in rig.fronts], [1, 1])
        self.talk(rig, alice, bob)
        rig.upgrade()
        self.talk(rig, alice, bob)
        alice[0].sock.close()
        rig.pass_time(0, 11)
        rig.settle(lambda: len(rig.fronts) == 1)
        self.talk(rig, bob)
        self.assertEqual([len(front.tunnels) for front in rig.fronts], [1])

    def test_it_is_killed(self):
        """Its users' connections end, the log says it, and another serves the next."""
        rig, alice, _ = self.player(tls=True, reattach=300)
        plain = rig.player("Bob")
        lurker = rig.client(tls=True)
        with self.assertLogs(has.log) as logged:
            rig.end_front(rig.fronts[0])
            rig.settle(lambda: rig.fronts)
            rig.pass_time(11)
        said = "\n".join(logged.output)
        self.assertRegex(said, r"ERROR.*the process that speaks TLS \(pid \d+\) has ended: "
                         r".*\(2 connections\); it is started anew")
        self.assertIn("the line dropped (the process that speaks TLS has ended)", said)
        alice.read(), lurker.read()
        self.assertEqual((alice.ended, lurker.ended, state_of(lurker)), (True, True, "gone"))
        self.talk(rig, plain)
        back = rig.client(tls=True)
        rig.game.accept(), rig.game.accept()
        back.says("connect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        self.assertIn(b"Welcome back", back.read())

    def test_links_that_were_in_it_are_made_anew(self):
        """That says nothing of the world: nobody is taken for one who was booted."""
        rig = self.rig()
        self.world_in_tls(rig)
        client, link = rig.player()
        with self.assertLogs(has.log):
            rig.end_front(rig.fronts[0])
            rig.settle(lambda: rig.fronts)
            link = rig.game.accept()
            rig.shake_hands(link)
        self.assertEqual((state_of(client), client.lines()), ("RETURNING", ["# OFFLINE"]))
        rig.let_in(link)
        self.assertEqual(client.lines(), ["# ONLINE"])
        self.talk(rig, (client, link))
        self.assertEqual(rig.beat.asks, [])

    def test_one_that_dies_again_and_again(self):
        rig = self.rig()
        launched, launch = [], rig.hub.fronts.launch

        def fails(fd):
            launched.append(rig.clock())
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        rig.hub.fronts.launch = fails
        with self.assertLogs(has.log):
            rig.hub.fronts.look()
            rig.pass_time(*[0.1] * 600)
        self.assertTrue(8 < len(launched) < 14, launched)
        rig.hub.fronts.launch = launch
        rig.pass_time(*[1] * 31)
        self.talk(rig, rig.player(tls=True))

    def test_what_is_asked_of_one_that_is_not_started_yet_waits(self):
        rig = self.rig()
        launch, held = rig.hub.fronts.launch, []
        rig.hub.fronts.launch = lambda fd: held.append(os.dup(fd)) or 1 << 30
        ours, theirs = tcp_pair()
        peer = TLSPeer(ours, rig.settle)
        rig.peers.append(peer)
        rig.hub.door.on_accept(theirs, "203.0.113.9", True)
        rig.settle()
        launch(held[0])
        os.close(held[0])
        rig.shake_hands(peer)
        self.assertEqual(len(rig.hub.sessions), 1)

    def test_one_that_reads_nothing_keeps_nobody_waiting(self):
        rig = self.rig()
        rig.hub.fronts.launch = lambda fd: rig.held.append(os.dup(fd)) or 1 << 30
        rig.held = []
        peers = []
        with self.assertLogs(has.log) as logged:
            for _ in range(1000):
                ours, theirs = socket.socketpair()
                peers.append(Peer(ours, rig.settle))
                rig.hub.door.on_accept(theirs, "203.0.113.9", True)
                if peers[-1].read() is not None and peers[-1].ended:
                    break
        self.assertIn("does not keep up", logged.output[-1])
        for it in peers:
            it.sock.close()
        os.close(rig.held[0])

    def test_it_is_not_needed_any_more(self):
        rig = self.rig()
        alice = rig.player(tls=True)
        rig.settings = rig.hub.settings = settings_of(())
        rig.hub.fronts.look()
        self.talk(rig, alice)
        alice[0].sock.close()
        rig.pass_time(0, 11)
        rig.settle(lambda: not rig.fronts)
        self.assertEqual(rig.hub.fronts.all, [])

    def test_worker_and_keeper_are_killed(self):
        """Nobody holds its channel: it ends with what it has."""
        rig, alice, _ = self.player(tls=True)
        front = rig.fronts[0]
        for known in rig.hub.fronts.all:
            known.channel.close()
        for stream in (alice.session.client, alice.session.link):
            stream.sock.close()
        rig._close_wires(rig.hub)
        rig.hub.turn = lambda longest=None: None
        rig.settle(lambda: not rig.fronts)
        alice.read()
        self.assertTrue(alice.ended and not front.tunnels)


class PlaceInTLS(TLSCase, ReattachCase):
    """What was on the way is known of users in TLS, too."""

    def cut(self, rig, how, lines=3000):
        """A flood, in the middle of which the line is cut: (client, link, what it has got)."""
        client, link = rig.player(tls=True)
        sock, got = self.tunnel(rig).line.sock, b""
        rig.settle(lambda: not has.unacknowledged(sock))
        began = self.acknowledged(sock) - client.count
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        for number in range(lines):
            link.send(b"line %d\r\n" % number)
            if number % 10 == 0:
                rig.settle()
            if number in (lines // 3, lines - 1):
                got += client.read()
        unread, until = b"", time.monotonic() + 5
        while (self.acknowledged(sock) != began + client.count + len(unread)
               and time.monotonic() < until):
            select.select([], [], [], 0.01)     # it goes on, and is acknowledged late
            with contextlib.suppress(BlockingIOError):
                unread = client.sock.recv(1 << 22, socket.MSG_PEEK)
        (client.reset if how == "RST" else client.sock.close)()
        rig.settle()
        return client, link, got + client.decrypted(unread)

    @staticmethod
    def acknowledged(sock):
        """How many bytes the client's kernel has acknowledged, but for a constant."""
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        return struct.unpack_from("Q", info, 120)[0]            # tcpi_bytes_acked, linux/tcp.h

    @unittest.skipUnless(sys.platform == "linux", "TCP_INFO says how much was acknowledged")
    def test_a_flood_cut_in_the_middle(self):
        for how in ("FIN", "RST") * 3:
            with self.subTest(how):
                rig = self.rig(reattach_limit=1 << 20)
                client, link, got = self.cut(rig, how)
                self.assertTrue(client.session.place.away_at)
                again, _ = self.comes_back(rig, tls=True)
                shown = again.read()
                self.assertIn(b"your place was kept", shown)
                doubted, _, missed = shown.rpartition(b"You missed")
                numbers = [int(line[5:]) for line in re.findall(
                    rb"line \d+(?=\r\n)", got[:got.rfind(b"\n") + 1] + missed)]
                self.assertEqual(numbers, list(range(3000)))
                self.talk(rig, (again, link))

    def test_the_end_of_an_idle_line_repeats_nothing(self):
        rig, client, link = self.player(tls=True)
        link.says("seen\r\n")
        self.assertEqual(client.read(), b"seen\r\n")
        client.hangs_up()
        link.says("missed\r\n")
        again, _ = self.comes_back(rig, tls=True)
        text = again.read()
        self.assertEqual((text.count(b"seen"), text.count(b"missed\r\n")), (0, 1))

    def test_a_client_that_is_dead_and_one_that_lives(self):
        for ago, is_dead in ((math.inf, True), (0, False)):
            rig, client, link = self.player(tls=True)
            link.says("seen\r\n")
            client.read()
            with mock.patch.object(has, "acknowledged_ago", return_value=ago):
                again, own = rig.newcomer(tls=True)
                again.says("connect Alice pw\r\n")
                rig.pass_time(*[0.1] * 40)
            text = again.read()
            self.assertEqual((b"Welcome back" in text, b"goes on at" in text, text.count(b"seen")),
                             (is_dead, False, int(is_dead)))    # perhaps he saw it
            self.assertEqual(b"goes on at" in client.read(), is_dead)
            self.assertEqual(b"connect Alice pw" in own.read(), not is_dead)

    def test_after_a_death_of_the_worker(self):
        rig = self.rig().keep()
        client, link = rig.player(tls=True)
        rig.die()
        self.assertIsNotNone(client.session.client.wire)
        link.says("seen\r\n")
        self.assertEqual(client.read(), b"seen\r\n")
        client.hangs_up()
        rig.die()
        again, _ = self.comes_back(rig, tls=True)
        self.assertNotIn(b"seen", again.read())
        self.talk(rig, (again, link))

    def test_a_user_who_has_quit_reads_the_last_words(self):
        rig, client, link = self.player(tls=True)
        client.send("QUIT\r\n")
        client.sock.shutdown(socket.SHUT_WR)
        rig.settle()
        link.send("Goodbye\r\n")
        link.hangs_up()
        self.assertEqual(client.read(), b"Goodbye\r\n")


class TakenOverWhateverTheDisk(RigCase):
    """What a rescue or an upgrade finds on disk is not what it needs."""

    def setUp(self):
        if not shutil.which("openssl"):
            self.skipTest("needs openssl")
        self.folder = new_folder(self)
        self.cert, self.key = certificate(self.folder)
        self.log = os.path.join(self.folder, "logs", "has.log")
        os.mkdir(os.path.dirname(self.log))
        self.addCleanup(lambda: has.install_log(logging.NullHandler(), "info"))

    def secure_rig(self, **settings):
        """A HAS with a TLS listener and a log file; settings in a has.conf that stays."""
        conf = os.path.join(self.folder, "has.conf")
        settings = {**PLAIN_SETTINGS, "local_port": free_port(), "local_port_ssl": free_port(),
                    "ssl_cert": self.cert,
                    "ssl_key": self.key, "log_file": self.log, "log_level": "info", **settings}
        with open(conf, "w") as file:
            file.writelines(f"{key} = {value}\n" for key, value in settings.items())
        rig = self.rig(up=False)
        rig.settings = has.load_settings(has.__file__, conf)[0]
        rig.hub.selector.close()
        rig.hub = rig._new_hub()
        rig.found("life 1")
        has.start_log(rig.settings)
        rig.hub.door.listen()
        return rig

    def certificate_shown(self, rig):
        """What a new client is shown."""
        found = []
        address = "127.0.0.1", rig.settings.local_port_ssl
        thread = threading.Thread(target=lambda: found.append(ssl.get_server_certificate(address)),
                                  daemon=True)
        thread.start()
        rig.settle(lambda: not thread.is_alive())
        return found[0].split()

    def goes_on(self, rig, client, link):
        for here, there in ((client, link), (link, client)):
            there.read()
            here.says("hello\r\n")
            self.assertEqual(there.read(), b"hello\r\n")

    def test_a_certificate_that_is_half_renewed(self):
        with open(self.cert) as file:
            before = file.read().split()
        other = os.path.join(self.folder, "other")
        os.mkdir(other)
        certificate(other)
        for how in ("certificate", "key", "empty", "gone", "both"):
            with self.subTest(how):
                certificate_then, key_then = open(self.cert).read(), open(self.key).read()
                rig = self.secure_rig()
                client, link = rig.player()
                if how in ("certificate", "both"):
                    shutil.copy(os.path.join(other, "cert.pem"), self.cert)
                if how in ("key", "both"):
                    shutil.copy(os.path.join(other, "key.pem"), self.key)
                if how == "empty":
                    open(self.cert, "w").close()
                if how == "gone":
                    os.unlink(self.key)
                for _ in range(2):
                    rig.upgrade(anew=True)
                    self.goes_on(rig, client, link)
                self.assertEqual(self.certificate_shown(rig), before)
                told = open(self.log).read()
                if how != "both":
                    self.assertRegex(told, "WARNING .*those in force go "
                                           "on.*mend.*HUP.*ssl_(cert|key)")
                    rig.hub.reload._load = lambda: has.load_settings(has.__file__,
                                                                     rig.settings.conf)
                    rig.hub.reload.run()
                    self.assertEqual(self.certificate_shown(rig), before)
                    self.goes_on(rig, client, link)
                for path, text in ((self.cert, certificate_then), (self.key, key_then)):
                    write_text(path, text)
                os.unlink(self.log)

    def test_the_folder_of_the_log_has_gone(self):
        rig = self.secure_rig()
        client, link = rig.player()
        shutil.rmtree(os.path.dirname(self.log))
        said, real = [], has.LogHandler.emit
        with mock.patch.object(has.LogHandler, "emit", lambda it,
                               record: said.append((it._path, record.getMessage()))):
            rig.upgrade(anew=True)
        self.goes_on(rig, client, link)
        (path, line), *_ = said
        self.assertEqual(path, "")
        self.assertRegex(line, f"cannot open log_file {re.escape(self.log)}.*standard "
                               f"error.*make.*HUP")
        os.mkdir(os.path.dirname(self.log))
        has.log.handlers[0].reload(rig.settings)
        has.log.info("there again")
        self.assertIn("there again", open(self.log).read())

    def test_a_fault_in_what_is_only_a_warning(self):
        rig = self.secure_rig()
        client, link = rig.player()
        with mock.patch.object(has, "load_settings", side_effect=RecursionError("deep")):
            rig.upgrade(anew=True)
        self.goes_on(rig, client, link)


class TakenOverInPart(RigCase):
    """One session cannot be taken up, and no other program could do better: it ends, others
    live."""

    @staticmethod
    def spoilers():
        def unknown_state(packed):
            packed["state"] = "DANCING"

        def bad_value(packed):
            packed["values"]["typed"] = {"": "no such thing"}

        def no_client(packed):
            del packed["client"]

        def no_link_descriptor(packed):
            packed["link"] = {"out": packed["link"]["out"]}

        def bad_link(packed):
            packed["link"] = {"fd": packed["link"]["fd"]}

        def bad_host(packed):
            packed["values"]["host"] = "no:where"

        def no_values(packed):
            packed["values"] = {"number": packed["values"]["number"]}

        def nothing_left(packed):
            packed.clear()

        def closed_client(packed):
            os.close(packed["client"]["fd"])

        def closed_link(packed):
            os.close(packed["link"]["fd"])
        return {name: it for name, it in locals().items()}

    def test_it(self):
        for name, spoil in self.spoilers().items():
            for down in (False, True):
                with self.subTest(name, down=down):
                    rig = self.rig()
                    (alice, _), (bob, link), (carol, _) = map(rig.player, ("Alice", "Bob", "Carol"))
                    if down:
                        rig.down()
                        if "link" in name:
                            continue
                    number = alice.session.number
                    with self.assertLogs("has", "ERROR") as caught:
                        rig.upgrade(lambda state: spoil(state["sessions"][0]), whole=False)
                    self.assertIn("could not be taken over", caught.output[0])
                    self.assertNotIn(number, rig.hub.sessions)
                    self.assertEqual(len(rig.hub.sessions), 2)
                    if name not in ("no_client", "nothing_left"):
                        alice.read()
                        self.assertTrue(alice.ended)
                    check_consistent(self, rig)
                    bob.read(), carol.read()
                    if down:
                        rig.found("life 2")
                        link = rig.game.accept()
                        rig.let_in(link)
                        bob.read()
                    link.read()
                    bob.says("hello\r\n")
                    self.assertEqual(link.read(), b"hello\r\n")
                    rig.upgrade()
                    self.assertEqual(len(rig.hub.sessions), 2)

    def test_while_rehearsed_it_is_a_failure(self):
        rig, client, link = self.player()
        with self.assertRaises(RuntimeError):
            rig.upgrade(lambda state: state["sessions"][0].update(state="DANCING"))


class Isolation(RigCase):
    def plant(self, kind, method, victim):
        """Make a method of a session, or of a part of it, fail for one session."""
        real = getattr(kind, method)

        def faulty(part, *arguments):
            if getattr(part, "session", part) is victim:
                raise RuntimeError("planted")
            return real(part, *arguments)
        return mock.patch.object(kind, method, faulty)

    def test_a_fault_ends_its_session_only(self):
        causes = {
            (has.Inbox, "read"): lambda rig, link, client: client.send("QUIT\r\n"),
            (has.Feed, "read"): lambda rig, link, client: link.send(b"\xff\xf1text\r\n"),
            (has.Session, "on_stream_end"): lambda rig, link, client: link.sock.close(),
            (has.Session, "_lose_link"): lambda rig, link, client: rig.down(),
            (has.Session, "handle"): lambda rig, link, client: client.sock.close(),
            (has.Hold, "on_silence"): lambda rig, link, client: rig.heard("silent")}
        for (kind, method), make in causes.items():
            with self.subTest(method):
                rig = self.rig()
                (bad, link), (good, other) = rig.player("Alice"), rig.player("Bob")
                with self.plant(kind, method, bad.session):
                    with self.assertLogs("has", "ERROR") as logs:
                        make(rig, link, bad)
                        rig.settle()
                self.assertTrue(is_gone(bad))
                self.assertFalse(is_gone(good))
                self.assertIn("Alice", logs.output[0])
                check_consistent(self, rig)

    def test_a_fault_in_a_verdict_a_timer_or_a_return(self):
        for kind, method, column, event in (
                (has.Session, "handle", "ASKING", "verdict: left"),
                (has.Screen, "write", "RETURNING", "ten seconds"),
                (has.Opening, "failed", "OPENING", "ten seconds"),
                (has.Return, "plan", "BACKOFF", "ten seconds"),
                (has.Return, "plan", "WAITING", "world up"),
                (has.Opening, "connect", "WAITING", "world up")):
            with self.subTest(method, state=column):
                rig = self.rig()
                bad, link = bring_to(rig, column)
                good = rig.client()
                with self.plant(kind, method, bad.session), self.assertLogs("has", "ERROR"):
                    cause(rig, event, bad, link)
                    rig.settle()
                self.assertTrue(is_gone(bad))
                self.assertFalse(is_gone(good))
                check_consistent(self, rig)

    def test_a_fault_in_a_timer_or_a_turn_of_a_session_s_rooms_ends_it_alone(self):
        for name in ("inbox.take_turn", "lines.try_login", "hold.look", "screen._watch",
                     "way_back.settle"):
            with self.subTest(name):
                rig = self.rig()
                (bad, _), (good, _) = rig.player("Alice"), rig.player("Bob")
                room, method = name.split(".")
                room = getattr(bad.session, room)
                planted = RuntimeError("planted")
                with mock.patch.object(type(room), method, side_effect=planted, autospec=True):
                    with self.assertLogs("has", "ERROR") as logs:
                        rig.hub.later(0, types.MethodType(getattr(type(room), method), room))
                        rig.settle()
                self.assertTrue(is_gone(bad))
                self.assertFalse(is_gone(good))
                self.assertIn("Alice", logs.output[0])

    def test_a_fault_in_a_room_of_a_session_ends_that_session(self):
        """Timers and turns call the rooms directly."""
        def faulty(part):
            raise RuntimeError("planted")
        rooms = [has.Passage, *has.Part.__subclasses__()]
        self.assertGreater(len(rooms), 8)
        for room in rooms:
            rig = self.rig()
            bad, good = rig.client(), rig.client()
            part, = [it for it in [has.Passage(bad.session), *has.Passage(bad.session).parts]
                     if type(it) is room]
            rig.hub.later(1, types.MethodType(faulty, part))
            with self.assertLogs("has", "ERROR") as logs:
                rig.pass_time(1.1)
            self.assertEqual((is_gone(bad), is_gone(good)), (True, False), room)
            self.assertIn(str(bad.session), logs.output[0])

    def test_a_fault_of_the_hub_is_loud(self):
        rig = self.rig()
        rig.hub.later(1, lambda: 1 / 0)
        rig.clock.advance(2)
        self.assertRaises(ZeroDivisionError, rig.hub.turn, 0)


class NoSpinning(RigCase):
    def test_idle_states_cause_no_events(self):
        for column in COLUMNS:
            with self.subTest(state=column):
                rig = self.rig()
                bring_to(rig, column)
                self.assert_idle(rig)

    def assert_idle(self, rig):
        rig.settle()
        before, start = rig.events, time.monotonic()
        for _ in range(2):
            rig.hub.turn(0.05)
        self.assertEqual(rig.events, before)
        self.assertGreater(time.monotonic() - start, 0.08)

    def test_half_closed_client(self):
        rig, client, _ = self.player(tcp=True)
        client.sock.shutdown(socket.SHUT_WR)
        self.assert_idle(rig)

    def test_output_blocked_and_the_link_gone(self):
        rig, client, link = self.player()
        StuckClient.fill(self, rig, client, link)
        self.assert_idle(rig)
        link.reset()
        self.assert_idle(rig)

    def test_input_blocked(self):
        """The world does not read, the user types on; then a verdict is awaited and he still
        types."""
        rig, client, link = self.player()
        try:
            while True:
                client.says(b"x" * 70000 + b"\n")
        except BlockingIOError:
            pass
        self.assert_idle(rig)
        link.reset()
        self.assert_idle(rig)
        self.assertLess(len(client.session.inbox.kept), 8192 + 65536 + 1)


# ---- 7. limits

class FairTurns(RigCase):
    """Whoever sends much, or comes with many, has his turn, and the others theirs between."""

    LINES = [f"line {n}" for n in range(20 * has.PATIENCE)]

    def flood(self, rig, lines=LINES):
        client, link = rig.player("Alice")
        client.send("".join(line + "\r\n" for line in lines))
        return client, link

    def test_a_flood_of_lines_is_read_in_parts_and_in_order(self):
        rig, bob, bobs_link = self.player("Bob")
        _, link = self.flood(rig)
        read = []
        for _ in range(2 * len(self.LINES) // has.PATIENCE):
            bob.send("say hello\r\n")
            for said in ["say hello"], []:
                rig.hub.turn(0)
                self.assertEqual(bobs_link.lines(), said)
                part = link.lines()
                self.assertLessEqual(len(part), has.PATIENCE)
                read += part
        self.assertEqual(read, self.LINES)

    def test_after_a_flood_of_any_length_the_client_is_read_again(self):
        rig, client, link = self.player("Alice")
        for count in range(1, 3 * has.PATIENCE):
            client.says("".join(f"line {n}\r\n" for n in range(count)) + "half a")
            client.says(" line\r\n")
            self.assertEqual(link.lines(), [f"line {n}" for n in range(count)] + ["half a line"])

    def test_between_the_turns_of_a_flood_others_are_waited_for(self):
        """Or it would have HAS busy all the time. Nobody who has something to say waits for it."""
        for unit, count in ((b"x\r\n", 500), (b"a\xff\xf1", 500), (b"long", 999)):
            with self.subTest(unit):
                rig, waited = self.rig(), []
                bob, bobs_link = rig.player("Bob")
                alice, _ = rig.player("Alice")
                select = rig.hub.selector.select
                rig.hub.selector.select = lambda longest: waited.append(longest) or select(longest)
                alice.sock.send(unit * count)
                rig.hub.turn(0)
                for _ in range(2 + count * len(unit) // has.LOOK_BYTES):
                    bob.send("say hello\r\n")
                    rig.hub.turn(5)
                    self.assertEqual(bobs_link.lines(), ["say hello"])
                    rig.hub.turn(0)
                rig.settle()
                self.assertGreaterEqual(waited.count(has.BREATH_SECONDS),
                                        count * len(unit) // has.LOOK_BYTES)

    def test_what_is_written_down_of_a_flood_is_small(self):
        """In the game, too, and whatever is in it: all of it is written down, turn after turn."""
        if has.why_no_vault():
            self.skipTest(has.why_no_vault())
        for unit in (b"x\r\n", b"look\x01\r\n", b"a\xff\xf1", b"\xff\xfb\x2a",
                     b"\xff\xfa\x2ax\xff\xf0", b"\xff\xfa\xc9" + b"x" * 8900 + b"\xff\xf0"):
            with self.subTest(unit[:9]), mock.patch.object(
                    has.Vault, "write", autospec=True, side_effect=has.Vault.write) as write:
                rig = self.rig().keep()
                client, link = rig.player("Alice")
                client.sock.send(unit * (9000 // len(unit)))
                rig.settle(lambda: not client.session.inbox.backlog)
                sizes = [len(record) for call in write.call_args_list
                         for number, record in call[0][1].items() if number and record]
                self.assertGreater(len(sizes), 5)
                self.assertLess(max(sizes), 8 * has.LOOK_BYTES)
                got = link.read()
                if unit.endswith(b"\n"):
                    self.assertEqual(got, unit * (9000 // len(unit)))

    def test_nothing_overtakes_what_is_left_for_later_turns(self):
        """After an upgrade a client with such a rest is read at once."""
        rig = self.rig()
        lines = self.LINES[:5 * has.PATIENCE]   # they come in one read
        client, link = self.flood(rig, lines)
        rig.hub.turn(5)
        self.assertTrue(client.session.inbox.backlog)
        client.session.inbox.on_data(b"the end\r\n")
        rig.settle(lambda: not client.session.inbox.backlog)
        self.assertEqual(link.lines(), lines + ["the end"])

    def test_newcomers_come_in_by_and_by(self):
        rig = self.rig()
        rig.hub.door.listen()
        port, clients = rig.hub.door.listeners[0].sock.getsockname()[1], []
        for _ in range(3 * has.ACCEPTS_A_TURN):
            clients.append(socket.create_connection(("127.0.0.1", port)))
            self.addCleanup(clients[-1].close)
        for turn in (1, 2, 3):
            rig.hub.turn(5)
            self.assertEqual(len(rig.hub.sessions), turn * has.ACCEPTS_A_TURN)


class OneCharacterTwice(RigCase):
    """Two sessions of one character come back one by one; the first waits for the second
    (settled)."""

    INFO = b"### Begin INFO\r\nVersion: MUX\r\n### End INFO\r\n"

    def first_is_in(self, **settings):
        """(rig, first client, its link, second client): the second one's turn comes later."""
        rig = self.rig(resume_rate=0.01, **settings)
        rig.pass_time(101)
        first, _ = rig.player()
        rig.pass_time(101)
        second = rig.client()
        rig.pass_time(101)
        link = rig.game.accept()
        second.says("connect Alice pw\r\n")
        rig.let_in(link)
        rig.down()
        rig.pass_time(101)
        rig.found("life 2")
        link = rig.game.accept()
        rig.let_in(link)
        self.assertEqual((state_of(first), state_of(second), first.session.way_back.settled),
                         ("RETURNING", "WAITING", True))
        first.read(), second.read(), link.read()
        return rig, first, link, second

    def test_the_world_goes_again_meanwhile(self):
        for name in ("down", "moved"):
            with self.subTest(name):
                rig, first, _, second = self.first_is_in()
                rig.down() if name == "down" else rig.found("life 3", rig.other, AWAY)
                self.assertEqual((state_of(second), second.session.link), ("WAITING", None))
                self.assertIn(state_of(first), ("WAITING", "RETURNING"))

    def test_the_second_leaves_meanwhile(self):
        rig, first, link, second = self.first_is_in()
        second.hangs_up()
        link.says(self.INFO)
        self.assertEqual((state_of(first), first.lines()), ("PLAYING", ["# ONLINE"]))

    def test_the_second_takes_too_long(self):
        rig, first, link, _ = self.first_is_in()
        first.session.lines.settings = {b"SCREENWIDTH": b"90", b"OUTPUTPREFIX": b">"}
        rig.pass_time(10.1)
        link.says("after it\r\n")
        self.assertEqual((state_of(first), first.lines()), ("PLAYING", ["# ONLINE", "after it"]))
        self.assertIn("OUTPUTPREFIX >", link.lines())


class Guests(RigCase):
    def test_a_login_typed_by_a_waiting_guest_is_tried(self):
        rig, client, _ = self.player("guest")
        rig.down()
        client.says("connect Bob bobpw\r\n")
        self.assertIn("You will be logged in", client.lines()[-1])
        rig.found("life 2")
        self.assertIn("connect Bob bobpw", rig.game.accept().lines())

    def test_a_guest_is_nobody_at_the_new_login_screen(self):
        rig = self.rig(resume_rate=0.01)
        rig.pass_time(101)
        client, _ = rig.player("guest")
        rig.down()
        for _ in range(2):                      # also if the world is found again before his turn
            rig.found("life 2")
        rig.pass_time(101)
        self.assertEqual((state_of(client), client.session.character.login), ("LOGIN", None))
        self.assertEqual(client.lines()[-1], "# NOTICE # This world is ONLINE again. Guests have "
                                             "to log in again.")

    def test_a_guest_keeps_his_hold_when_the_world_goes_before_his_turn(self):
        rig = self.rig(resume_rate=0.001, hold=0, login_hold=50)
        rig.pass_time(1001)
        client, _ = rig.player("guest")
        rig.down()
        rig.pass_time(60)
        rig.found("life 2")
        rig.down()
        rig.pass_time(61)
        self.assertEqual(state_of(client), "WAITING")


class WhatWasTyped(RigCase):
    """What a line was is not forgotten, and not taken for another one."""

    def test_settings_are_bounded(self):
        rig, client, _ = self.newcomer(family="pennmush")
        for number in range(400):
            client.says(f"SOCKSET X{number}={'x' * 100}\r\n")
        client.says("SCREENWIDTH " + "9" * 3000 + "\r\n")
        self.assertEqual(len(client.session.lines.settings), 40)

    def test_a_login_that_was_refused_is_not_tried_again(self):
        rig, client, link = self.newcomer()
        client.says("connect Alice wrong\r\n")
        rig.let_in(link, None)
        rig.down()
        self.assertEqual((state_of(client), client.session.character.pending), ("WAITING", None))

    def test_a_refusal_in_other_words_or_in_two_pieces(self):
        for words in (["Either there is already a pla",
                       "yer with that name, or that name is illegal.\r\n"],
                      ["Guest logins are disabled.\r\n"], ["Pay your bill first.\r\n"]):
            with self.subTest(words):
                rig, client, link = self.newcomer()
                link.says("Welcome\r\n")
                client.says("create Alice pw\r\n")
                rig.pass_time(0.1)
                for piece in words:
                    link.says(piece)
                rig.pass_time(1.1)
                rig.down()
                self.assertEqual((state_of(client), client.session.character.pending),
                                 ("WAITING", None))

    def test_a_late_login_screen_is_no_answer(self):
        rig, client, link = self.newcomer()
        client.says("connect Alice pw\r\n")
        rig.pass_time(0.1)
        link.send("Welcome\r\n")
        rig.pass_time(1.1)
        rig.down()
        self.assertEqual(client.session.character.pending.password, b"pw")

    def test_a_refusal_by_a_world_that_refuses_the_heartbeat_too_says_nothing(self):
        """Its database may be broken: the login is tried again in its next life, and forgotten if
        that refuses it."""
        rig, client, _ = self.player()
        rig.restart("life 2", shut=True)
        client.read()
        link = rig.game.accept()
        rig.let_in(link, None)
        self.assertEqual((state_of(client), client.lines()[0]), ("LOGIN", "# REFUSED"))
        client.says("connect Alice pw\r\n")
        rig.let_in(link, None)
        rig.restart("life 3")
        link = rig.game.accept()
        self.assertIn("connect Alice pw", link.lines())
        client.session.character.trials and link.send(nonce_of(rig, client)
                                                      + b"\r\n### Begin INFO\r\n### End INFO\r\n")
        rig.settle()
        self.assertEqual((state_of(client), client.session.character.login.password),
                         ("PLAYING", b"pw"))

    def test_the_time_of_a_broken_worlds_login_screen_costs_nobody_his_login(self):
        rig, client, _ = self.player()
        rig.restart("life 2", shut=True)
        link = rig.game.accept()
        rig.let_in(link, None)
        client.read()
        rig.pass_time(120)
        link.hangs_up()
        rig.answer()
        self.assertEqual((state_of(client), rig.game.accept().lines()), ("LOGIN", []))
        rig.restart("life 3")
        self.assertIn("connect Alice pw", rig.game.accept().lines())

    def test_a_login_refused_by_a_sound_world_is_forgotten(self):
        rig, client, _ = self.player()
        for life, shut, wanted in (("life 2", True, b"pw"), ("life 3", False, None)):
            rig.restart(life, shut=shut)
            rig.let_in(rig.game.accept(), None)
            pending = client.session.character.pending
            self.assertEqual((state_of(client), pending and pending.password), ("LOGIN", wanted))

    def test_the_login_typed_behind_a_refused_one_is(self):
        rig, client, link = self.newcomer()
        client.says("connect Alice wrong\r\nconnect Alice pw\r\n")
        rig.let_in(link, None)
        rig.down()
        self.assertEqual((state_of(client), client.session.character.pending.password),
                         ("WAITING", b"pw"))

    def test_logout_behind_an_endless_line_is_seen(self):
        rig, client, _ = self.player()
        for text in ("x" * 20000, "y\r\n", "LOGOUT\r\n"):
            client.says(text)
        self.assertEqual((state_of(client), client.session.character.login), ("LOGIN", None))

    def test_a_login_in_the_game_is_one_if_softcode_has_logged_him_out(self):
        """`@force me=LOGOUT`, or somebody else's; nobody comes back as him who was there before."""
        for out, words, name in ((True, "Welcome", "Bob"), (True, None, "Alice"),
                                 (False, "Huh?", "Alice")):
            with self.subTest(out=out, words=words):
                rig, client, link = self.player()
                client.read()
                client.says("connect Bob bobpw\r\n")
                front, before, line, behind = link.lines()
                self.assertEqual(line, "connect Bob bobpw")
                said = [front.split()[1]] * (not out) + [words or "No."]
                said += [before.split()[1]] * bool(words)
                link.says("".join(it + "\r\n" for it in said).encode())
                self.assertEqual(client.lines(), [words or "No."])
                self.assertEqual((state_of(client), client.session.character.login.name.decode()),
                                 ("PLAYING", name))
                rig.pass_time(has.MARK_SECONDS + 1)
                self.assertFalse(client.session.screen.careful)

    def test_who_guesses_in_the_game_waits_like_others(self):
        rig, client, link = self.player()
        lines = [f"connect Wizard wrong{number}" for number in range(has.LoginBrake.FREE + 1)]
        for line in lines:
            client.says(line + "\r\n")
        self.assertEqual([it for it in link.lines() if it in lines], lines[:-1])
        client.says("the next\r\n")
        self.assertEqual(link.lines(), [])
        rig.pass_time(has.LoginBrake.FIRST + 1)
        self.assertEqual([it for it in link.lines() if it in lines + ["the next"]],
                         [lines[-1], "the next"])
        self.assertEqual(state_of(client), "PLAYING")

    def test_logout_forgets_every_pair(self):
        rig, client, link = self.returning()
        rig.let_in(link)
        client.says("LOGOUT\r\n")
        session = client.session
        self.assertEqual((session.character.login, session.character.trials,
                          session.character.checked), (None, [], None))

    def test_a_client_that_half_closes_right_after_its_return_has_said_all(self):
        rig, client, link = self.returning()
        client.says("one\r\ntwo\r\nthree\r\n")
        rig.let_in(link)
        client.sock.shutdown(socket.SHUT_WR)
        rig.settle()
        self.assertEqual(link.lines()[-3:], ["one", "two", "three"])
        self.assertTrue(link.ended)

    def test_another_login_typed_while_the_first_is_being_checked(self):
        rig = self.rig("pennmush", up=False)
        client = rig.client()
        rig.down()
        client.says("connect Alice pw\r\n")
        rig.found("life 1", checks=True)
        (number, serial, pairs), = rig.beat.checks
        client.says("connect Bob bobpw\r\n")
        rig.post(rig.hub.on_checked, number, serial, [False])
        self.assertEqual([pair.name for pair in rig.beat.checks[-1][2]], [b"Bob"])
        rig.post(rig.hub.on_checked, *rig.beat.checks[-1][:2], [True])
        self.assertIn("connect Bob bobpw", rig.game.accept().lines())

    def test_a_second_answer_about_the_same_pairs_changes_nothing(self):
        rig = self.rig("pennmush", resume_rate=0.01, up=False)
        client = rig.client()
        rig.down()
        session = client.session
        session.character.login, session.character.previous = (
            has.Credentials(b"connect", b"Alice", word) for word in (b"new", b"old"))
        for _ in range(2):
            rig.found("life 1", checks=True)
        asked = list(rig.beat.checks)
        self.assertEqual(len(asked), 2)
        for number, serial, _ in asked:
            rig.post(rig.hub.on_checked, number, serial, [False, True])
        self.assertEqual((session.character.trials, len(rig.beat.checks)),
                         ([session.character.previous], 2))

    def test_telnet_of_a_client_that_does_not_read_reaches_the_world(self):
        rig, client, link = self.player()
        client.session.client.full = True
        size = b"\xff\xfa\x1f\x00\x50\x00\x18\xff\xf0"
        client.says(b"\xff\xfb\x1f" + size)
        self.assertEqual(link.read(), b"\xff\xfb\x1f" + size)


class TestLoginBrake(unittest.TestCase):
    """The brake alone: tries at addresses, with the time as a number."""

    def test_each_further_try_waits_longer(self):
        brake, now, waits = has.LoginBrake(), 1000.0, []
        for _ in range(15):
            waits.append(brake.wait("a", now))
            now += waits[-1]
            brake.count("a", b"bob", now)
        self.assertEqual(waits, [0, 0, 0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 30, 30])
        self.assertEqual((brake.wait("b", now), brake.left("b", now), brake.left("a", now)),
                         (0, 3, 0))
        self.assertEqual(brake.wait("a", now + brake.MEMORY), 0)

    def test_a_success_forgives_the_tries_at_that_character_only(self):
        brake = has.LoginBrake()
        for name in (b"mallory", b"wizard", b"wizard", b"wizard"):
            brake.count("a", name, 1000.0)
        brake.forgive("a", b"mallory")
        self.assertEqual(brake.left("a", 1000.0), 0)
        brake.forgive("a", b"wizard")
        self.assertEqual((brake.left("a", 1000.0), brake.tries), (3, {}))

    def test_its_memory_is_bounded(self):
        brake = has.LoginBrake()
        for number in range(brake.MOST + 50):
            for _ in range(30 if number > brake.MOST else 1):
                brake.count(str(number), b"x", 1000.0)
        self.assertEqual(len(brake.tries), brake.MOST)
        self.assertLess(max(map(len, brake.tries.values())), 21)


# What five real servers made of typed lines (worlds/bytes.md 6): packets -> outcome, the line
# understood, where it is not
# what was typed; "[": what stands in an unfinished line.
VECTORS = r"""
** tinymux
b"connect Alice alicepw\r\n"->IN  ``  b"connect Alice alicepw\n"->IN
b"connect Alice alicepw\r"->NOTHING [connect Alice alicepw
b"  connect Alice alicepw  \r\n"->IN '  connect Alice alicepw  '
b"connect\tAlice\talicepw\r\n"->FAIL 'connectAlicealicepw'  ``  b"\tconnect Alice alicepw\r\n"->IN
b"connect Alice alicepw x\r\n"->IN 'connect Alice alicepw x'  ``  b"connect Alice alicepw\0\r\n"->IN
b"connect Alice alicepw\0x\r\n"->FAIL 'connect Alice alicepwx'
b"connect Alice alicepw\r\0\n"->IN  ``  b"c\x01onnect Alice alicepw\r\n"->IN
b"connect Alice alicep\x01w\r\n"->IN  ``  b"connect Alice alicepX\x08w\r\n"->IN
b"connect Alice alicepX\x7fw\r\n"->IN  ``  b"connect Alice alicepX\xff\xf7w\r\n"->IN
b"x\xff\xf8connect Alice alicepw\r\n"->BANNER 'xconnect Alice alicepw'
b"connect Alice alicep\xc3\xa9\x7fw\r\n"->FAIL 'connect Alice alicep\xc3w'
b"connect Alice alicep\xc3\xa9\x08\x08w\r\n"->IN  ``  b"connect Alice alicep\xe9w\r\n"->FAIL
b"connect Alice alicep\x85w\r\n"->FAIL 'connect Alice alicep\u2026w'
b"connect Alice alicepw\xe2\x80\xa8\r\n"->FAIL 'connect Alice alicepw\xe2\xa8'
b"connect\xc0\xa0Alice alicepw\r\n"->FAIL  ``  b"connect Alice alice\xff\xf1pw\r\n"->IN
b"connect Alice alice\xff\xf9pw\r\n"->IN
b"connect Alice alicep\xffw\r\n"->FAIL 'connect Alice alicep'
b"connect Alice alicep\xffXw\r\n"->IN
b"connect Alice alicep\xff\xffw\r\n"->FAIL 'connect Alice alicep\xffw'
b"connect Alice alicep\xff\xffXw\r\n"->FAIL 'connect Alice alicep\xffXw'
b"connect Alice alice\xff\xfd\x01pw\r\n"->IN
b"connect Alice alice\xff\xfa\x1fab\xff\xf0pw\r\n"->IN
b"connect Alice alice\xff\xfaxy\xff\xf1pw\r\n"->NOTHING [connect Alice alice
b"connect Alice alicepw\xff\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\r\n"->IN
b"connect Alice alicepw\xff\xfd\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\xfd\r\n"->IN
b"connect Alice alicepw\xff\xfa\x18x\r\n"->NOTHING [connect Alice alicepw
[b"co\xff", b"\xfd\x01nnect Alice alicepw\r\n"]->IN
[b"co\xff\xfd", b"\x01nnect Alice alicepw\r\n"]->IN
[b"co\xff\xfaxy", b"\xff\xf0nnect Alice alicepw\r\n"]->IN
[b"connect Alice alicepw\r", b"\n"]->IN  ``  b"QUIT\r\n"->CLOSED  ``  b"quit\r\n"->BANNER
b" QUIT\r\n"->BANNER  ``  b"QUIT x\r\n"->CLOSED 'QUIT x'  ``  b"QUIT \r\n"->CLOSED 'QUIT '
b"\x01QUIT\r\n"->CLOSED  ``  b"QUIT\0x\r\n"->BANNER 'QUITx'  ``  b"LOGOUT\r\n"->CLOSED
b"logout\r\n"->BANNER  ``  b"LOG\x01OUT\r\n"->CLOSED  ``  b"CONNECT Alice alicepw\r\n"->BANNER
b"c Alice alicepw\r\n"->BANNER  ``  b"cox Alice alicepw\r\n"->IN 'cox Alice alicepw'
b" xyz Alice alicepw\r\n"->BANNER  ``  b'connect "Alice" alicepw\r\n'->IN 'connect "Alice" alicepw'
b'connect "Alice"alicepw\r\n'->IN 'connect "Alice"alicepw'  ``  b'connect Alice "alicepw"\r\n'->FAIL
b"connect alice alicepw\r\n"->IN 'connect alice alicepw'  ``  b"connect Alice Alicepw\r\n"->FAIL
b"x\rconnect Alice alicepw\r\n"->BANNER 'xconnect Alice alicepw'
** tinymux UTF-8
b"connect Alice alicep\xc3Xw\r\n"->IN  ``  b"connect Alice alicepX\xc3\x7fw\r\n"->IN
b"connect Alice alicepw\xc3\r\n"->IN  ``  b"QU\xcc\x81IT\r\n"->CLOSED
b"QU\xe2\x82XIT\r\n"->CLOSED  ``  b"connect Alice alicep\xe9w\r\n"->FAIL 'connect Alice alicep'
b"QU\xe2\x80\x8bIT\r\n"->CLOSED  ``  b"connect Alice alice\xff\xffpw\r\n"->IN
b"QU\xc3\xff\xf1XIT\r\n"->CLOSED
** teenymush
b"connect Alice alicepw\r\n"->IN  ``  b"connect Alice alicepw\n"->IN
b"connect Alice alicepw\r"->NOTHING [connect Alice alicepw
b"  connect Alice alicepw  \r\n"->IN '  connect Alice alicepw  '
b"connect\tAlice\talicepw\r\n"->BANNER
b"\tconnect Alice alicepw\r\n"->IN '\tconnect Alice alicepw'
b"connect Alice alicepw x\r\n"->INVALID  ``  b"connect Alice alicepw\0\r\n"->FAIL
b"connect Alice alicepw\0x\r\n"->FAIL
b"connect Alice alicepw\r\0\n"->FAIL 'connect Alice alicepw\x00'
b"c\x01onnect Alice alicepw\r\n"->BANNER  ``  b"connect Alice alicep\x01w\r\n"->FAIL
b"connect Alice alicepX\x08w\r\n"->FAIL  ``  b"connect Alice alicepX\x7fw\r\n"->FAIL
b"connect Alice alicepX\xff\xf7w\r\n"->FAIL 'connect Alice alicepXw'
b"x\xff\xf8connect Alice alicepw\r\n"->BANNER 'xconnect Alice alicepw'
b"connect Alice alicep\xc3\xa9\x7fw\r\n"->FAIL 'connect Alice alicep\xe9\x7fw'
b"connect Alice alicep\xc3\xa9\x08\x08w\r\n"->FAIL 'connect Alice alicep\xe9\x08\x08w'
b"connect Alice alicep\xe9w\r\n"->CRASHTEXT 'connect Alice alicep\ufffdw'
b"connect Alice alicep\x85w\r\n"->CRASHTEXT 'connect Alice alicep\ufffdw'
b"connect Alice alicepw\xe2\x80\xa8\r\n"->CRASHTEXT 'connect Alice alicepw\u2028'
b"connect\xc0\xa0Alice alicepw\r\n"->BANNER 'connect\ufffd\ufffdAlice alicepw'
b"connect Alice alice\xff\xf1pw\r\n"->IN  ``  b"connect Alice alice\xff\xf9pw\r\n"->IN
b"connect Alice alicep\xffw\r\n"->FAIL 'connect Alice alicep'
b"connect Alice alicep\xffXw\r\n"->IN
b"connect Alice alicep\xff\xffw\r\n"->CRASHTEXT 'connect Alice alicep\ufffdw'
b"connect Alice alicep\xff\xffXw\r\n"->CRASHTEXT 'connect Alice alicep\ufffdXw'
b"connect Alice alice\xff\xfd\x01pw\r\n"->IN
b"connect Alice alice\xff\xfa\x1fab\xff\xf0pw\r\n"->IN
b"connect Alice alice\xff\xfaxy\xff\xf1pw\r\n"->IN
b"connect Alice alicepw\xff\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\r\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\xfd\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\xfd\r\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\xfa\x18x\r\n"->NOTHING [connect Alice alicepw
[b"co\xff", b"\xfd\x01nnect Alice alicepw\r\n"]->IN
[b"co\xff\xfd", b"\x01nnect Alice alicepw\r\n"]->IN
[b"co\xff\xfaxy", b"\xff\xf0nnect Alice alicepw\r\n"]->IN
[b"connect Alice alicepw\r", b"\n"]->IN  ``  b"QUIT\r\n"->CLOSED  ``  b"quit\r\n"->CLOSED 'quit'
b" QUIT\r\n"->CLOSED ' QUIT'  ``  b"QUIT x\r\n"->CLOSED 'QUIT x'  ``  b"QUIT \r\n"->CLOSED 'QUIT '
b"\x01QUIT\r\n"->BANNER  ``  b"QUIT\0x\r\n"->BANNER  ``  b"LOGOUT\r\n"->BANNER
b"logout\r\n"->BANNER  ``  b"LOG\x01OUT\r\n"->BANNER
b"CONNECT Alice alicepw\r\n"->IN 'CONNECT Alice alicepw'  ``  b"c Alice alicepw\r\n"->CREATE
b"cox Alice alicepw\r\n"->BANNER  ``  b" xyz Alice alicepw\r\n"->BANNER
b'connect "Alice" alicepw\r\n'->IN 'connect "Alice" alicepw'
b'connect "Alice"alicepw\r\n'->FAIL
b'connect Alice "alicepw"\r\n'->FAIL  ``  b"connect alice alicepw\r\n"->IN 'connect alice alicepw'
b"connect Alice Alicepw\r\n"->FAIL
b"x\rconnect Alice alicepw\r\n"->BANNER 'xconnect Alice alicepw'
b"\xc2\xa0connect Alice alicepw\r\n"->IN '\xa0connect Alice alicepw'
b"connect Alice\talicepw\r\n"->IN 'connect Alice\talicepw'
b"connect Alice\xe3\x80\x80alicepw\r\n"->IN 'connect Alice\u3000alicepw'
b"connect Alice alicepw\xff\r\n"->NOTHING [connect Alice alicepw
b"co Alice alicepw\r\n"->IN 'co Alice alicepw'  ``  b"q\r\n"->CLOSED 'q'
b"QU\xff\rXIT\r\n"->CLOSED  ``  b"\r\n"->WHO
** pennmush
b"connect Alice alicepw\r\n"->IN  ``  b"connect Alice alicepw\n"->IN
b"connect Alice alicepw\r"->IN  ``  b"  connect Alice alicepw  \r\n"->IN '  connect Alice alicepw  '
b"connect\tAlice\talicepw\r\n"->BANNER 'connect?Alice?alicepw'
b"\tconnect Alice alicepw\r\n"->BANNER '?connect Alice alicepw'
b"connect Alice alicepw x\r\n"->IN 'connect Alice alicepw x'  ``  b"connect Alice alicepw\0\r\n"->IN
b"connect Alice alicepw\0x\r\n"->IN  ``  b"connect Alice alicepw\r\0\n"->IN
b"c\x01onnect Alice alicepw\r\n"->BANNER 'c?onnect Alice alicepw'
b"connect Alice alicep\x01w\r\n"->FAIL 'connect Alice alicep?w'
b"connect Alice alicepX\x08w\r\n"->IN
b"connect Alice alicepX\x7fw\r\n"->FAIL 'connect Alice alicepX?w'
b"connect Alice alicepX\xff\xf7w\r\n"->FAIL 'connect Alice alicepX?w'
b"x\xff\xf8connect Alice alicepw\r\n"->BANNER 'x?connect Alice alicepw'
b"connect Alice alicep\xc3\xa9\x7fw\r\n"->FAIL 'connect Alice alicep???w'
b"connect Alice alicep\xc3\xa9\x08\x08w\r\n"->IN
b"connect Alice alicep\xe9w\r\n"->FAIL 'connect Alice alicep?w'
b"connect Alice alicep\x85w\r\n"->FAIL 'connect Alice alicep?w'
b"connect Alice alicepw\xe2\x80\xa8\r\n"->FAIL 'connect Alice alicepw???'
b"connect\xc0\xa0Alice alicepw\r\n"->BANNER 'connect??Alice alicepw'
b"connect Alice alice\xff\xf1pw\r\n"->IN
b"connect Alice alice\xff\xf9pw\r\n"->FAIL 'connect Alice alice?pw'
b"connect Alice alicep\xffw\r\n"->IN
b"connect Alice alicep\xffXw\r\n"->FAIL 'connect Alice alicepXw'
b"connect Alice alicep\xff\xffw\r\n"->FAIL 'connect Alice alicep?w'
b"connect Alice alicep\xff\xffXw\r\n"->FAIL 'connect Alice alicep?Xw'
b"connect Alice alice\xff\xfd\x01pw\r\n"->IN
b"connect Alice alice\xff\xfa\x1fab\xff\xf0pw\r\n"->IN
b"connect Alice alice\xff\xfaxy\xff\xf1pw\r\n"->FAIL 'connect Alice alice?pw'
b"connect Alice alicepw\xff\n"->NOTHING ['connect Alice alicepw\n
b"connect Alice alicepw\xff\r\n"->FAIL 'connect Alice alicepw?'
b"connect Alice alicepw\xff\xfd\n"->NOTHING ['connect Alice alicepw
b"connect Alice alicepw\xff\xfd\r\n"->IN
b"connect Alice alicepw\xff\xfa\x18x\r\n"->NOTHING ['connect Alice alicepw
[b"co\xff", b"\xfd\x01nnect Alice alicepw\r\n"]->BANNER 'co???nnect Alice alicepw'
[b"co\xff\xfd", b"\x01nnect Alice alicepw\r\n"]->BANNER 'co?nnect Alice alicepw'
[b"co\xff\xfaxy", b"\xff\xf0nnect Alice alicepw\r\n"]->BANNER 'co?nnect Alice alicepw'
[b"connect Alice alicepw\r", b"\n"]->IN  ``  b"QUIT\r\n"->CLOSED  ``  b"quit\r\n"->BANNER
b" QUIT\r\n"->BANNER  ``  b"QUIT x\r\n"->BANNER  ``  b"QUIT \r\n"->BANNER
b"\x01QUIT\r\n"->BANNER '?QUIT'  ``  b"QUIT\0x\r\n"->CLOSED  ``  b"LOGOUT\r\n"->BANNER
b"logout\r\n"->BANNER  ``  b"LOG\x01OUT\r\n"->BANNER 'LOG?OUT'
b"CONNECT Alice alicepw\r\n"->IN 'CONNECT Alice alicepw'
b"c Alice alicepw\r\n"->IN 'c Alice alicepw'  ``  b"cox Alice alicepw\r\n"->BANNER
b" xyz Alice alicepw\r\n"->BANNER  ``  b'connect "Alice" alicepw\r\n'->IN 'connect "Alice" alicepw'
b'connect "Alice"alicepw\r\n'->IN 'connect "Alice"alicepw'  ``  b'connect Alice "alicepw"\r\n'->FAIL
b"connect alice alicepw\r\n"->IN 'connect alice alicepw'  ``  b"connect Alice Alicepw\r\n"->FAIL
b"x\rconnect Alice alicepw\r\n"->IN
** pennmush UTF-8
b"QU\xc4\xb0T\r\n"->CLOSED  ``  b"connect \xce\x91lice alicepw\r\n"->IN
b"\xc4\x8donnect Alice alicepw\r\n"->IN
b"connect \xe2\x80\x9cAlice\xe2\x80\x9d alicepw\r\n"->IN 'connect "Alice" alicepw'
b"connect Alice alicep\xc3\xa9\x08w\r\n"->FAIL 'connect Alice alicep?w'
b"connect Alice alicep\xc3\xa9\x08\x08w\r\n"->IN  ``  b"QUIT\xc2\xa0\r\n"->BANNER 'QUIT?'
** tinymush
b"connect Alice alicepw\r\n"->IN  ``  b"connect Alice alicepw\n"->IN
b"connect Alice alicepw\r"->IN  ``  b"  connect Alice alicepw  \r\n"->IN '  connect Alice alicepw  '
b"connect\tAlice\talicepw\r\n"->IN 'connect\tAlice\talicepw'
b"\tconnect Alice alicepw\r\n"->IN '\tconnect Alice alicepw'
b"connect Alice alicepw x\r\n"->IN 'connect Alice alicepw x'  ``  b"connect Alice alicepw\0\r\n"->IN
b"connect Alice alicepw\0x\r\n"->FAIL 'connect Alice alicepwx'
b"connect Alice alicepw\r\0\n"->IN  ``  b"c\x01onnect Alice alicepw\r\n"->IN
b"connect Alice alicep\x01w\r\n"->IN
b"connect Alice alicepX\x08w\r\n"->FAIL 'connect Alice alicepXw'
b"connect Alice alicepX\x7fw\r\n"->IN
b"connect Alice alicepX\xff\xf7w\r\n"->FAIL 'connect Alice alicepXw'
b"x\xff\xf8connect Alice alicepw\r\n"->BANNER 'xconnect Alice alicepw'
b"connect Alice alicep\xc3\xa9\x7fw\r\n"->FAIL 'connect Alice alicew'
b"connect Alice alicep\xc3\xa9\x08\x08w\r\n"->IN  ``  b"connect Alice alicep\xe9w\r\n"->IN
b"connect Alice alicep\x85w\r\n"->IN  ``  b"connect Alice alicepw\xe2\x80\xa8\r\n"->IN
b"connect\xc0\xa0Alice alicepw\r\n"->FAIL 'connectAlice alicepw'
b"connect Alice alice\xff\xf1pw\r\n"->IN  ``  b"connect Alice alice\xff\xf9pw\r\n"->IN
b"connect Alice alicep\xffw\r\n"->FAIL 'connect Alice alicep'
b"connect Alice alicep\xffXw\r\n"->IN  ``  b"connect Alice alicep\xff\xffw\r\n"->IN
b"connect Alice alicep\xff\xffXw\r\n"->FAIL 'connect Alice alicepXw'
b"connect Alice alice\xff\xfd\x01pw\r\n"->IN
b"connect Alice alice\xff\xfa\x1fab\xff\xf0pw\r\n"->FAIL 'connect Alice aliceabpw'
b"connect Alice alice\xff\xfaxy\xff\xf1pw\r\n"->FAIL 'connect Alice alicexypw'
b"connect Alice alicepw\xff\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\r\n"->IN
b"connect Alice alicepw\xff\xfd\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\xfd\r\n"->IN
b"connect Alice alicepw\xff\xfa\x18x\r\n"->FAIL 'connect Alice alicepwx'
[b"co\xff", b"\xfd\x01nnect Alice alicepw\r\n"]->IN
[b"co\xff\xfd", b"\x01nnect Alice alicepw\r\n"]->IN
[b"co\xff\xfaxy", b"\xff\xf0nnect Alice alicepw\r\n"]->IN 'coxynnect Alice alicepw'
[b"connect Alice alicepw\r", b"\n"]->IN  ``  b"QUIT\r\n"->CLOSED  ``  b"quit\r\n"->BANNER
b" QUIT\r\n"->BANNER  ``  b"QUIT x\r\n"->CLOSED 'QUIT x'  ``  b"QUIT \r\n"->CLOSED 'QUIT '
b"\x01QUIT\r\n"->CLOSED  ``  b"QUIT\0x\r\n"->BANNER 'QUITx'  ``  b"LOGOUT\r\n"->CLOSED
b"logout\r\n"->BANNER  ``  b"LOG\x01OUT\r\n"->CLOSED  ``  b"CONNECT Alice alicepw\r\n"->BANNER
b"c Alice alicepw\r\n"->BANNER  ``  b"cox Alice alicepw\r\n"->IN 'cox Alice alicepw'
b" xyz Alice alicepw\r\n"->BANNER  ``  b'connect "Alice" alicepw\r\n'->IN 'connect "Alice" alicepw'
b'connect "Alice"alicepw\r\n'->IN 'connect "Alice"alicepw'  ``  b'connect Alice "alicepw"\r\n'->FAIL
b"connect alice alicepw\r\n"->IN 'connect alice alicepw'  ``  b"connect Alice Alicepw\r\n"->FAIL
b"x\rconnect Alice alicepw\r\n"->IN  ``  b"connect Alice alicep\xff\xfaw\xff\xf0\r\n"->IN
b"QU\xe2\x82\xacIT\r\n"->CLOSED
[b"connect Alice alicep\xff\xfd", b"Xw\r\n"]->FAIL 'connect Alice alicepXw'
b"con\x1bnect Alice alicepw\r\n"->IN 'con\x1bnect Alice alicepw'
** rhostmush
b"connect Alice alicepw\r\n"->IN  ``  b"connect Alice alicepw\n"->IN
b"connect Alice alicepw\r"->NOTHING [connect Alice alicepw
b"  connect Alice alicepw  \r\n"->IN '  connect Alice alicepw  '
b"connect\tAlice\talicepw\r\n"->BANNER 'connectAlicealicepw'  ``  b"\tconnect Alice alicepw\r\n"->IN
b"connect Alice alicepw x\r\n"->IN 'connect Alice alicepw x'  ``  b"connect Alice alicepw\0\r\n"->IN
b"connect Alice alicepw\0x\r\n"->FAIL 'connect Alice alicepwx'
b"connect Alice alicepw\r\0\n"->IN  ``  b"c\x01onnect Alice alicepw\r\n"->IN
b"connect Alice alicep\x01w\r\n"->IN  ``  b"connect Alice alicepX\x08w\r\n"->IN
b"connect Alice alicepX\x7fw\r\n"->IN
b"connect Alice alicepX\xff\xf7w\r\n"->FAIL 'connect Alice alicepXw'
b"x\xff\xf8connect Alice alicepw\r\n"->BANNER 'xconnect Alice alicepw'
b"connect Alice alicep\xc3\xa9\x7fw\r\n"->FAIL 'connect Alice alicep%<u00e9w'
b"connect Alice alicep\xc3\xa9\x08\x08w\r\n"->FAIL 'connect Alice alicep%<u00ew'
b"connect Alice alicep\xe9w\r\n"->FAIL 'connect Alice alicep%<233>w'
b"connect Alice alicep\x85w\r\n"->IN
b"connect Alice alicepw\xe2\x80\xa8\r\n"->FAIL 'connect Alice alicepw%<u2028>'
b"connect\xc0\xa0Alice alicepw\r\n"->IN  ``  b"connect Alice alice\xff\xf1pw\r\n"->IN
b"connect Alice alice\xff\xf9pw\r\n"->IN
b"connect Alice alicep\xffw\r\n"->FAIL 'connect Alice alicep'
b"connect Alice alicep\xffXw\r\n"->IN
b"connect Alice alicep\xff\xffw\r\n"->FAIL 'connect Alice alicep'
b"connect Alice alicep\xff\xffXw\r\n"->IN  ``  b"connect Alice alice\xff\xfd\x01pw\r\n"->IN
b"connect Alice alice\xff\xfa\x1fab\xff\xf0pw\r\n"->IN
b"connect Alice alice\xff\xfaxy\xff\xf1pw\r\n"->IN
b"connect Alice alicepw\xff\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\r\n"->IN
b"connect Alice alicepw\xff\xfd\n"->NOTHING [connect Alice alicepw
b"connect Alice alicepw\xff\xfd\r\n"->IN
b"connect Alice alicepw\xff\xfa\x18x\r\n"->NOTHING [connect Alice alicepw
[b"co\xff", b"\xfd\x01nnect Alice alicepw\r\n"]->IN
[b"co\xff\xfd", b"\x01nnect Alice alicepw\r\n"]->IN
[b"co\xff\xfaxy", b"\xff\xf0nnect Alice alicepw\r\n"]->IN
[b"connect Alice alicepw\r", b"\n"]->IN  ``  b"QUIT\r\n"->CLOSED  ``  b"quit\r\n"->CLOSED 'quit'
b" QUIT\r\n"->FAIL  ``  b"QUIT x\r\n"->CLOSED 'QUIT x'  ``  b"QUIT \r\n"->CLOSED 'QUIT '
b"\x01QUIT\r\n"->CLOSED  ``  b"QUIT\0x\r\n"->BANNER 'QUITx'  ``  b"LOGOUT\r\n"->CLOSED
b"logout\r\n"->CLOSED 'logout'  ``  b"LOG\x01OUT\r\n"->CLOSED
b"CONNECT Alice alicepw\r\n"->IN 'CONNECT Alice alicepw'
b"c Alice alicepw\r\n"->IN 'c Alice alicepw'  ``  b"cox Alice alicepw\r\n"->BANNER
b" xyz Alice alicepw\r\n"->IN ' xyz Alice alicepw'  ``  b'connect "Alice" alicepw\r\n'->FAIL
b'connect "Alice"alicepw\r\n'->FAIL  ``  b'connect Alice "alicepw"\r\n'->FAIL
b"connect alice alicepw\r\n"->IN 'connect alice alicepw'  ``  b"connect Alice Alicepw\r\n"->FAIL
b"x\rconnect Alice alicepw\r\n"->BANNER 'xconnect Alice alicepw'
b"connect\xe0\x80\xa0Alice\xf0\x80\x80\xa0alicepw\r\n"->IN
b"connect Alice alicep\xc3\xa9\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7fw\r\n"->IN
b"connect Alice alicep\xe9\x7f\x7f\x7f\x7f\x7f\x7fw\r\n"->IN
b"QU\xff\xff\xff\xffIT\r\n"->BANNER 'QU%<255>IT'
b"connect Alice alicepw\xff\xff\n"->NOTHING [connect Alice alicepw
b"connect Alice alicep\xe2\x80\x9c\x7fw\r\n"->IN
b" QUIT Alice alicepw\r\n"->IN ' QUIT Alice alicepw'  ``  b"QUIT\xc0\xa0x\r\n"->CLOSED 'QUIT x'
b"QU\xc1\x89T\r\n"->BANNER 'QU%<u0049>T'
"""


def vectors():
    """(family, charset, packets, outcome, line understood or None) of each of VECTORS."""
    family = charset = None
    for entry in re.split(r"\n|  ``  ", VECTORS.strip()):
        if entry.startswith("** "):
            family, _, charset = entry[3:].partition(" ")
            continue
        typed, outcome, line = re.fullmatch(r"(.*?)->([A-Z]+)(?: (.*))?", entry).groups()
        packets = ast.literal_eval(typed)
        packets = packets if isinstance(packets, list) else [packets]
        if line and line[0] == "[":
            line = None
        elif line:
            line = ast.literal_eval(line)
        elif outcome == "IN":
            line = "connect Alice alicepw"
        elif outcome == "CLOSED":
            line = "LOGOUT" if b"L" in b"".join(packets) else "QUIT"
        elif outcome != "NOTHING":
            line = b"".join(packets).rstrip(b"\r\n").decode("latin-1")
        yield family, charset, packets, outcome, line


# What the real TinyMUX (2.12.0.10) read by after these, sent by the client: sub-negotiations
# without IAC SB and IAC SE.
UTF_8, LATIN_1, OTHERS = b"UTF-8", b"", (b"CP437", b"US-ASCII", b"ISO-8859-2")
ENV = b"\x27\0"
CHARSETS_OF_TINYMUX = [
    *[([b"*\2" + name], name) for name in (UTF_8, *OTHERS)], ([b"*\2ISO-8859-1"], b"ISO-8859-1"),
    *[([b"*\2CP437", b"*" + body], b"CP437") for body in (
        b"\2utf-8", b"\2", b"\2UTF-8X", b"\2UTF8", b"\1", b"\1;", b"\1;;",
        b"\1;UTF-8", b"\1;utf-8;", b"\1;UTF-8X;", b"\1; UTF-8;", b"\1UUTF-8U",
        b"\1" b"8UTF-8", b"\1[TTABLE]\1;UTF-8;", b"\5", b"\7UTF-8")],
    *[([b"*\1" + body], UTF_8) for body in (b";UTF-8;", b" UTF-8 ", b";UTF-8;x",
                                            b";foo;bar;UTF-8;CP437;", b";;UTF-8;;", b"XUTF-8X",
                                           b";ISO-8859-15;UTF-8;", b";\xff\xff;UTF-8;",
                                            b";" + b"x" * 52 + b";UTF-8;")],
    ([b"*\1;CP437;UTF-8;"], b"CP437"), ([b"*\1;" + b"x" * 53 + b";UTF-8;"], LATIN_1),
    ([b"*\2UTF-8", b"*\3"], b"US-ASCII"),
    ([b"*\2CP437", ENV + b"\0LANG\1en.UTF-8"], UTF_8), ([b"*\2UTF-8", ENV + b"\0LANG\1C"], UTF_8),
    *[([ENV + body], UTF_8) for body in (
        b"\0LANG\1en.UTF-8", b"\3lang\1utf-8", b"\0LC_ALL\1.UtF-8", b"\3LC_CTYPE\1x.utf-8\0X",
        b"\0LANG\0X\1UTF-8", b"X\0LANG\1UTF-8",
        b"\1\0LANG\1UTF-8", b"\0LANG\1UTF-8\0LANG\1C", b"\0X\1a\0Y\1b\0LANG\1UTF-8",
        b"\0X\1a\0\0LANG\1UTF-8",
        b"\0X\1a\0LC_ALL\1C\0LANG\1UTF-8", b"\0LANG\1en\xff\xff.UTF-8",
        b"\0LANG\1" + b"x" * 48 + b".UTF-8")],
    ([b"\x27\2\0LANG\1UTF-8"], UTF_8),
    *[([ENV + body], LATIN_1) for body in (
        b"\0XLANG\1UTF-8", b"\0LANGX\1UTF-8", b"LANG\1UTF-8", b"\0LANG",
        b"\0LANG\1a.b.UTF-8", b"\0LANG\1UTF-8.x", b"\0LANG\1UTF-8\2", b"\0LANG\1\1UTF-8",
        b"\0LANG\1UTF-8\1", b"\0\0LANG\1UTF-8", b"\0LANG\3Q\1UTF-8", b"\0Q\0LANG\1UTF-8",
        b"\0LA\2NG\1UTF-8", b"\0X\1a\0LANG\1UTF-8",
        b"\0LANG\1C\0LC_ALL\1UTF-8", b"\0X\1a\0X\1b\0Z\1c\0LANG\1UTF-8",
        b"\0LANG\1" + b"x" * 49 + b".UTF-8")],
    *[([b"\x27" + kind + b"\0LANG\1UTF-8"], LATIN_1) for kind in (b"\1", b"\5")]]


class Reader:
    """A scripted world that only reads: what it makes of the packets of one connection."""

    def __init__(self, family, charset=""):
        self.world = WORLDS[family]()
        self.conn = Connection(self.world, None, False)
        # gone: nothing is written
        self.conn.gone = self.conn.telnet_ok = self.conn.spoken = True
        self.lines = []
        self._end_line, self.world.end_line = self.world.end_line, self._ended
        self.world.arrived = lambda *_: None
        self.world.negotiate = self.world.telnet_command = lambda *_: None
        if charset:
            self.world.received(self.conn, sub(CHARSET, b"\x02" + charset.encode()))

    def _ended(self, conn, lines):
        self._end_line(conn, lines)
        self.lines.extend(map(self.decode, lines))
        lines.clear()

    def meant(self, line, charset):
        """A line of HAS's as the server has it that reads by this character set."""
        kept = self.conn.charset, self.conn.utf8
        self.conn.charset, self.conn.utf8 = charset.decode() or None, charset == b"UTF-8"
        line = self.decode(line)
        self.conn.charset, self.conn.utf8 = kept
        return line

    def decode(self, line):
        """The line as the server has it; RhostMUSH has its own spelling of characters."""
        if self.world.family != "rhostmush":
            return self.world.decode(self.conn, line)
        return "".join(c if c < "\x80" else "%%<u%04x>" % ord(c) for c in line.decode("utf-8"))

    def read(self, *packets):
        for packet in packets:
            self.world.received(self.conn, packet)
        return self.lines


MARK_LINE = re.compile(r"OUTPUT(?:PREFIX|SUFFIX)(?: =\S+)?|SESSION| ")


class Front:
    """HAS in front of a Reader: what each makes of what one client types."""

    def __init__(self, case, family, state="LOGIN", charset=""):
        for target, value in (("Stream.send", self._sent), ("Lines.take", self._typed),
                              ("LoginQueue.wait", lambda *_: 0)):
            owner, name = getattr(has, target.partition(".")[0]), target.partition(".")[2]
            setattr(self, name, getattr(owner, name))
            patch = unittest.mock.patch.object(owner, name, (
                lambda value: lambda *arguments: value(*arguments))(value))
            patched(case, patch)
        for name, value in (("_WATCHED", re.compile(b"")), ("_WATCHED_FIRST", bytes(range(256)))):
            patched(case, mock.patch.object(has, name, value))      # no line goes by unread
        self.reader, self.understood, self.refused = Reader(family), [], []
        self.rig = case.rig(family)
        self.client = self.rig.client()
        self.session, self.peer = self.client.session, self.rig.game.accept()
        if state == "PLAYING":
            self.session.character.login = GOOD
            self.session.enter(has.State.PLAYING)
        if charset:
            self.type(sub(CHARSET, b"\x02" + charset.encode()))

    def _sent(self, stream, data):
        if stream is getattr(getattr(self, "session", None), "link", 0):
            self.reader.read(bytes(data))
        return self.send(stream, data)

    def _typed(self, lines, line, raw):
        out = self.take(lines, line, raw)
        charset = lines.session.inbox.typed.charset
        (self.understood if out else self.refused).append(self.reader.meant(line, charset))
        return out

    def type(self, *packets):
        for packet in packets:
            self.client.send(packet)
            self.rig.settle()
            self.peer.read()
            self.client.read()

    def heard(self):
        """The lines the world has read, but for HAS's own."""
        return [line for line in self.reader.lines if line and not MARK_LINE.fullmatch(line)]

    def meant(self):
        """The lines HAS has passed on, as it understood them."""
        return [line for line in self.understood if line and not MARK_LINE.fullmatch(line)]


def spoil(line, byte, at):
    return line[:at] + bytes((byte,)) + line[at:]


def without_unsure(text):
    """Without what a TinyMUX keeps or drops as the tables in it say."""
    return "".join(it for it in text
                   if has._fate(it.encode("utf-8", "surrogatepass")) is not None)


class TypedBytes(unittest.TestCase):
    """A typed line is read as the server reads it."""

    def test_the_scripted_worlds_read_as_the_real_servers(self):
        for family, charset, packets, outcome, line in vectors():
            with self.subTest(family=family, charset=charset, packets=packets):
                lines = [it for it in Reader(family, charset).read(*packets) if it]
                if charset == "UTF-8" and family == "pennmush" and line and "\xc4" in line:
                    continue
                self.assertEqual(lines[-1:], [] if line in (None, "") else [line])

    def test_has_reads_the_vectors_without_telnet_too(self):
        for family, charset, packets, outcome, line in vectors():
            if b"\xff" in b"".join(packets) or outcome == "NOTHING":
                continue
            with self.subTest(family=family, charset=charset, packets=packets):
                if family in ("pennmush", "tinymush"):
                    packets = [packets[0].replace(b"x\rc", b"c")]
                read_line = finished(family, b"".join(packets), charset.encode())
                again = Reader(family, charset).read(read_line + b"\r\n")
                if "\x1b" not in line and family != "teenymush":
                    self.assertEqual(again[:1], [line])
                if family == "rhostmush" and '"' in line:
                    # quoted names are off by default there, and can be switched on
                    continue
                login = DIALECTS[family].read_login(read_line)
                self.assertEqual(bool(login)
                                 and (login.name.lower(), login.password) == (b"alice", b"alicepw")
                                 and not login.creates, outcome == "IN")
                if outcome in ("CLOSED", "BANNER"):
                    self.assertEqual(bool(DIALECTS[family].quit_login.match(read_line)),
                                     outcome == "CLOSED")

    def each_family(self):
        for family in FAMILIES:
            for charset in ("", "UTF-8") if family in ("tinymux", "pennmush") else ("",):
                yield family, charset

    def agrees(self, family, charset, text):
        """HAS reads `text`, one line, as the world does; and typed again it is read the same."""
        world = [it for it in Reader(family, charset).read(text) if it]
        reader = has.LineReader()
        reader.charset = charset.encode()
        lines = [line for _, line in reader.lines(DIALECTS[family], text) if line]
        if charset and family == "pennmush":        # its table of spellings is not known
            self.assertTrue(all(line.isascii() for line in lines), text)
            self.assertEqual([it for it in world if it.isascii() and "?" not in it], [
                it.decode() for it in lines if b"?" not in it], text)
            return
        decode = Reader(family, charset).decode
        if charset:
            def decode(line, decode=decode):
                return without_unsure(decode(line))
            world = [without_unsure(it) for it in world]
            seen = text.decode("utf-8", "ignore")
            if seen != without_unsure(seen) and set(seen) & set("\b\x7f"):
                return                              # nor are its erasers, then
        if family == "tinymush":                    # there HAS takes it out
            world = [it.replace("\x1b", "") for it in world]
        self.assertEqual(world, [decode(line) for line in lines], (family, charset, text))
        for line in lines:
            again = Reader(family, charset).read(line.replace(b"\xff", b"\xff\xff") + b"\n")
            again = [without_unsure(it) for it in again] if charset else again
            self.assertEqual(again, [decode(line)], (family, charset, text))

    def test_which_character_set_a_tinymux_reads_by(self):
        for bodies, expected in CHARSETS_OF_TINYMUX:
            reader, world = has.LineReader(), Reader("tinymux")
            for body in bodies:
                reader.note_charset(DIALECTS["tinymux"], b"\xff\xfa" + body + b"\xff\xf0")
                world.read(b"\xff\xfa" + body + b"\xff\xf0")
            with self.subTest(bodies=bodies):
                self.assertEqual(reader.charset, expected)
                self.assertEqual((world.conn.charset or "").encode(), expected)

    def test_what_a_tinymux_may_drop_of_utf_8_makes_no_other_command(self):
        """As measured: by Unicode 8 or so, whatever Python knows; marks as it likes."""
        kept = "\xe9\u0430\u0905\u3000\u2028\u4e2d\u20ac\xa0\ufffd"
        dropped = "\x80\x9f\xad\u200b\u200d\ufeff\u2060"
        either = "\u0560\u1c80\U0001f900\U0001f600\u0900\u034f\u0360\ue000\ue100\u08b5\u20c0"
        for text, fate in ((kept, True), (dropped, False), (either, None)):
            for character in text:
                self.assertIs(has._fate(character.encode()), fate, hex(ord(character)))
                mux, utf8 = DIALECTS["tinymux"], character.encode()
                for line in (b"LOG%sOUT now", b"%sLOGOUT", b" LOGOUT%s"):
                    line = finished("tinymux", line % utf8 + b"\n", b"UTF-8").lstrip()
                    self.assertIs(bool(mux.logout.match(line)), not fate, line)
                line = finished("tinymux", b"c%so Alice p%sw\n" % (utf8, utf8), b"UTF-8")
                login = mux.read_login(line)
                self.assertEqual(login and login.password, None if fate else
                                 b"pw" if fate is False else b"p%sw" % utf8)

    def test_a_pennmush_may_read_by_what_the_client_asks_for(self):
        for body in (b"\2utf-8", b"\1;UTF-8", b"\1;ASCII;UTF-8;x"):
            self.assertEqual(finished("pennmush", b"L\xd0\x9eGOUT\n",
                                      DIALECTS["pennmush"].charset_after(sub(CHARSET, body), b"")),
                             b"LOGOUT")
        self.assertEqual(DIALECTS["pennmush"].charset_after(sub(CHARSET, b"\3"), UTF_8), UTF_8)
        self.assertEqual(DIALECTS["pennmush"].charset_after(sub(CHARSET, b"\1;ASCII"), b""), b"")

    def test_each_byte_inside_a_line(self):
        for family, charset in self.each_family():
            for byte in range(255):
                for at in (0, 3, 7):
                    self.agrees(family, charset, spoil(b"LOG OUT", byte, at) + b"\r\n")

    def test_each_pair_of_bytes_with_an_eraser(self):
        for family, charset in self.each_family():
            for eraser in (8, 127):
                for byte in range(255):
                    self.agrees(family, charset, b"ab%c%cc\n" % (byte, eraser))
                    self.agrees(family, charset, b"ab%c%c%cc\n" % (byte, 0xa9, eraser))
                    self.agrees(family, charset, b"ab%c%c%c%cc\n" % (0xc3, byte, eraser, eraser))

    def test_a_line_is_kept_up_to_the_limit_of_the_server(self):
        for family in FAMILIES:
            line = finished(family, b"QUIT " + b"x" * 70000 + b"\b\x7f\n")
            self.assertLessEqual(len(line), DIALECTS[family].longest_line)
            self.assertTrue(line.startswith(b"QUIT xx"))


class TypedThroughHAS(RigCase):
    """The world reads what HAS passes on as HAS has read it."""

    def test_the_vectors_at_the_login_screen(self):
        for family, charset, packets, outcome, line in vectors():
            with self.subTest(family=family, charset=charset, packets=packets):
                front = Front(self, family, "LOGIN", charset)
                front.type(*packets)
                self.assertEqual(front.heard(), front.meant())
                if b"\xff" not in b"".join(packets) and outcome in (
                    "IN", "CLOSED") and family != "teenymush":
                    self.assertEqual(front.heard()[-1:], [line.replace("\x1b", "")])
                self.doCleanups()

    PARTS = [b"connect Alice pw", b"LOGOUT", b"QUIT", b"PROXY x y", b"PRO",
             b"XY a b", b"@remotehostname h", b"think a",
             b"\r\n", b"\n", b"\r", b"\b", b"\x7f", b"\0", b"\t", b"\x1b",
             b"\x01", b"\x80", b"\x85", b"\xa0", b"\xc3",
             b"\xc3\xa9", b"\xe2\x80\x9c", b"\xe2\x82", b"\xc0\xa0", b"\xcc\x81",
             b"\xc4\xb0", b"\xf0\x9f\x98\x80", b"\xf1", b" ",
             b"\xff\xf1", b"\xff\xf7", b"\xff\xf6", b"\xff\xff", b"\xff\xfd\x01",
             b"\xff\xfd", b"\xff", b"\xffX", b"\xff\n",
             b"\xff\xfa\x18\x00x\xff\xf0", b"\xff\xfa\x18q\nQUIT", *[
                 sub(CHARSET, b"\x02" + name)
                 for name in (b"UTF-8", b"ISO-8859-1", b"US-ASCII", b"CP437", b"utf-8")],
             *[sub(CHARSET, b"\x01" + names)
               for names in (b";UTF-8", b";UTF-8;", b";CP437;UTF-8;")],
             sub(39, b"\0\0LANG\1en.UTF-8"), sub(39, b"\0\0X\1a\0LANG\1en.UTF-8"),
             b"\xff\xfaxy\xff\xf1", b"\xff\xf0", b"L", b"O", b"T", b"x"]

    def test_erasers_behind_such_a_character_are_spelled_out(self):
        for typed, passed in ((b"LOGOUTX\xe1\xb2\x80\x7f\n", b"LOGOUTX\n"),
                              (b"say \xe1\xb2\x80\n", b"say \xe1\xb2\x80\n"),
                              (b"say a\x7fb\xe1\xb2\x80\n", b"say a\x7fb\xe1\xb2\x80\n"),
                              (b"say \xe1\xb2\x80a\x7fb\n", b"say \xe1\xb2\x80b\n")):
            front = Front(self, "tinymux", "PLAYING", "UTF-8")
            sent = []
            front.reader.read = sent.append
            front.type(typed)
            self.assertEqual(b"".join(sent), passed)
            self.doCleanups()

    def check_fuzz(self, family, charset, state, seed):
        rng = random.Random(f"{family} {charset} {state} {seed}")
        front = Front(self, family, state, charset)
        data = b"".join(rng.choice(self.PARTS) for _ in range(rng.randint(4, 60)))
        packets = list(chop(rng, data + b"\n"))
        front.type(*packets)
        heard, meant = front.heard(), front.meant()
        # its spellings are not known
        if family == "pennmush" and state == "PLAYING" and front.session.inbox.typed.charset:
            heard, meant = ([it in ("QUIT", "LOGOUT") for it in lines] for lines in (heard, meant))
        if family == "tinymux":
            heard, meant = ([*filter(None, map(without_unsure, lines))] for lines in (heard, meant))
        self.assertEqual(heard, meant, (seed, family, charset, state, packets))
        self.assertFalse([it for it in heard if state == "LOGIN"
                          and re.match(r"\s*(?i:proxy|@)", it) and front.rig.family
                          .handover_words
                          and DIALECTS[family].is_handover(it.encode("latin-1", "replace"),
                                                           "auto")])
        self.doCleanups()

    def test_fuzz(self):
        for seed in [*range(12), secrets_seed()]:
            for family in FAMILIES:
                for charset in ("", "UTF-8") if family in ("tinymux", "pennmush") else ("",):
                    for state in ("LOGIN", "PLAYING"):
                        with self.subTest(seed=seed, family=family, charset=charset, state=state):
                            self.check_fuzz(family, charset, state, seed)

    def test_a_second_hand_over_never_reaches_the_world(self):
        for line in (b"PROQ\x01\x7fXY TCP4 1.2.3.4 1.1.1.1 1 2",
                     b"PROQ\x80\x7fXY TCP4 1.2.3.4 1.1.1.1 1 2",
                     b"PRO\xc3\xa9" + b"\x7f" * 8 + b"XY TCP4 1.2.3.4 1.1.1.1 1 2",
                     b"PROXY\xc0\xa0x\xc0\xa01.2.3.4",
                     b"PRO\xff\xffQXY TCP4 1.2.3.4 1.1.1.1 1 2",
                     b"PRO\xffQXY TCP4 1.2.3.4 1.1.1.1 1 2",
                     b"PROXY TCP4 1.2.3.4 1.1.1.1 1 2" + b" " * 16500):
            front = Front(self, "rhostmush")
            front.type(b"LOGOUT " + b"x" * 16500 + b"\r\n" + line + b"\r\nWHO\r\n")
            self.assertEqual(front.heard(), ["WHO"], line)
            self.doCleanups()

    def test_no_line_over_the_limit_of_the_server_passes_at_the_login_screen(self):
        for family in FAMILIES:
            limit = DIALECTS[family].longest_login
            front = Front(self, family)
            front.type(b"connect Alice pw" + b" " * (limit - 16) + b"\r\n")
            self.assertEqual(len(front.heard()), 1, family)
            front.type(b"connect Alice pw" + b" " * limit + b"\r\n")
            self.assertLessEqual(max(map(len, front.heard())), limit)
            self.assertEqual(len(front.heard()), 2 if family == "pennmush" else 1)
            self.doCleanups()

    def test_a_logout_in_disguise_is_seen(self):
        for family, lines in (
            ("tinymux", (b"LOG\x01OUT", b"  logoux\bt", b"LOGOUT " + b"x" * 20000)),
                              ("rhostmush", (b"LOG\x80OUT", b"LOGOUT\xc0\xa0x",
                                             b"LOGO\xff\xffxUT", b"LOGOUT " + b"x" * 20000)),
                              ("pennmush", (b"LOGOUT\0", b"LOGOUTX\b", b"LOG\xffOUT")),
                              ("tinymush", (b"LOG\x80OUT\tx", b" logoutx\x7f"))):
            for line in lines:
                front = Front(self, family, "PLAYING")
                front.type(line + b"\n")
                self.assertEqual((front.session.state.name, front.session.character.login),
                                 ("LOGIN", None), (family, line))
                self.doCleanups()

    def test_after_these_options_a_stream_is_no_telnet_to_be_read(self):
        for option in (19, 38, 46, 85, 86, 87):
            front = Front(self, "tinymux")
            front.client.send(offer((WILL, option), (DO, option)) + sub(option, b"\x01"))
            front.rig.settle()
            self.assertEqual((front.client.read(), front.peer.read()),
                             (offer((DONT, option), (WONT, option)), b""))
            front.peer.send(offer((WILL, option), (DO, option)) + sub(option, b"\x01"))
            front.rig.settle()
            self.assertEqual((front.client.read(), front.peer.read()),
                             (b"", offer((DONT, option), (WONT, option))))
            self.doCleanups()


class BoundMarks(RigCase):
    """A mark proves the line it was sent with, and nothing else."""

    def answer(self, family, marks):
        """A Rig's session at the login screen that typed a login; the world sends these marks of
        it."""
        rig, client, link = self.newcomer(family=family)
        client.says("connect Wizard wrong\r\n")
        number = re.search(rb"(=[0-9a-f]{8}00=)", link.read()).group(1)
        link.says(b"".join(number + mark + b"\r\n" if len(mark) < 2 else mark for mark in marks))
        return client.session

    def test_a_user_who_was_in_already_did_not_log_in_by_this_line(self):
        table = b"Pend  Lost\r\n"
        for family, silent, printed in (("tinymux", [b""], [b"f", b""]),
                                        ("tinymush", [b""], [b"f", b""]),
                                        ("pennmush", [b"a", b"z"], [b"f", b"a", b"z"]),
                                        ("rhostmush", [b"b", b"y", b"a", table, b"z"],
                                         [b"b", table, b"y", b"a", table, b"z"])):
            session = self.answer(family, silent)
            self.assertEqual((session.state.name, session.character.proven),
                             ("PLAYING", b"wizard"), family)
            session = self.answer(family, printed)
            self.assertEqual((session.state.name, session.character.proven,
                              session.character.login), ("LOGIN", b"", None), family)

    def behind(self, *lines, family="tinymux"):
        """A user of a Rig who has typed these lines in one packet, which begin with a login."""
        rig, client, link = self.newcomer(family=family, admins="Wizard")
        client.says("".join(line + "\r\n" for line in lines))
        numbers = re.findall(rb"OUTPUTPREFIX (=[0-9a-f]{10}=)\r", link.read())

        def world(text, number=None):
            link.says(text + (numbers[number] + b"\r\n" if number is not None else b""))
        return client, link, world

    def test_what_is_typed_behind_a_login_is_read_in_the_game(self):
        ALICE, BOB = (b"Alice", b"pw"), (b"Bob", b"bobpw")
        for lines, answers, expected in (
                (["logout"], [(b"", 0)], None), ([" LogOut now"], [(b"", 0)], None),
                (["look", "logout", "logout"], [(b"", 0)], None),
                (["look"], [(b"", 0)], ALICE),
                (["@password pw=new"], [(b"", 0), (b"Password changed.\r\n",)], (b"Alice", b"new")),
                (["@password pw=new"], [(b"", 0), (b"Sorry.\r\n",)], ALICE),
                (["@name me=Eve"], [(b"", 0), (b"Name set.\r\n",)], (b"Eve", b"pw")),
                (["logout", "connect Bob bobpw"], [(b"", 0), (b"", 1)], BOB),
                (["logout", "connect Bob no"], [(b"", 0), (b"No.\r\n",)], None),
                (["connect Bob bobpw", "logout"], [(b"", 0)], None),
                (["logout", "@password pw=new"], [(b"", 0), (b"Password changed.\r\n",)], None),
                (["logout", "connect Bob bobpw", "@password bobpw=new"],
                 [(b"", 0), (b"", 1), (b"Password changed.\r\n",)], (b"Bob", b"new")),
                (["logout", "connect Bob bobpw", "logout"], [(b"", 0), (b"", 1)], None),
                (["logout"] * 17, [(b"", 0)], None),
                (["@name x=y"] * 17 + ["logout"], [(b"", 0)], None)):
            with self.subTest(lines=lines):
                client, _, world = self.behind("connect Alice pw", *lines)
                for answer in answers:
                    world(*answer)
                login = client.session.character.login
                self.assertEqual((login and (login.name, login.password), state_of(client)),
                                 (expected, "PLAYING" if expected else "LOGIN"))
                self.doCleanups()

    def test_quit_behind_a_login_is_quit(self):
        client, link, world = self.behind("connect Alice pw", "quit")
        world(b"Bye\r\n", 0)
        link.sock.close()
        client.session.hub.turn(0.01)
        self.assertIn(state_of(client), ("CLOSING", "gone"))

    def test_who_logs_in_behind_a_logout_has_not_quit(self):
        for lines in (["connect Alice pw", "LOGOUT", "connect Bob pw"], ["QUIT", "connect Bob pw"]):
            client, _, world = self.behind(*lines)
            world(client.session.feed.proof._secret + b"%02x=\r\n" % (len(lines) - 2))
            self.assertEqual(state_of(client), "PLAYING")
            client.session.hub.heard("lost", "no answer", True)
            client.session.hub.turn(0.01)
            self.assertEqual(state_of(client), "WAITING")
            self.doCleanups()

    def test_both_marks_in_one_read(self):
        client, _, world = self.behind("connect Alice pw", "logout", "connect Bob bobpw")
        secret = client.session.feed.proof._secret
        world(secret + b"00=\r\nwelcome\r\n" + secret + b"01=\r\n")
        self.assertEqual((client.session.character.login.name, client.read().count(b"=")),
                         (b"Bob", 0))

    def test_who_was_in_the_game_proves_nothing_beyond_doubt_any_more(self):
        """He stays in it in spite of LOGOUT, or reads the marks, by @program."""
        client, link, world = self.behind("connect Alice pw")
        session, brake = client.session, client.session.hub.logins.brake
        world(b"", 0)
        self.assertEqual(session.character.proven, b"alice")
        client.send("LOGOUT\r\n")
        session.hub.turn(0.01)
        client.send("connect Wizard wrong\r\n")
        while not link.read().endswith(b"OUTPUTPREFIX\r\n"):
            session.hub.turn(0.01)
        world(session.feed.proof._secret + b"01=\r\n")
        self.assertEqual((state_of(client), session.character.login.name, session.character.proven),
                         ("PLAYING", b"Wizard", b""))
        self.assertEqual([name for _, name in brake.tries["203.0.113.9"]], [b"wizard"])
        client.read()
        client.send("#?\r\n")
        session.hub.turn(0.01)
        self.assertNotIn(b"heartbeat", client.read())

    def test_settings_are_repeated_as_they_were_typed(self):
        """The byte 255 is no telnet in them."""
        rig, client, link = self.newcomer(family="tinymux")
        client.says(b"OUTPUTPREFIX \xff\xff\xff\xff\xfa\r\nconnect Alice pw\r\n")
        self.assertTrue(link.read(
            ).endswith(b"\r\nconnect Alice pw\r\nOUTPUTPREFIX \xff\xff\xff\xff\xfa\r\n"))
        link.says(client.session.feed.proof._secret + b"00=\r\n")
        self.assertEqual(client.session.lines.setting_lines(False),
                         b"OUTPUTPREFIX \xff\xff\xff\xff\xfa\r\n")

    def test_the_marks_never_repeat_on_a_link(self):
        proof = has.proof_for(DIALECTS["tinymux"])
        sent = b"".join(proof.wrap(BAD, b"connect Alice wrong\r\n", {}) for _ in range(600))
        numbers = re.findall(rb"OUTPUTPREFIX (=\w+=)f", sent)
        self.assertEqual(len(set(numbers)), 600)
        self.assertEqual(proof.feed(numbers[599] + b"\r\n" + numbers[1] + b"\r\n"), b"")
        self.assertIs(proof.login, BAD)

    def test_a_denied_check_clears_everything(self):
        rig = self.rig("teenymush", up=False, admins="Wizard")
        rig.found("life 1", checks=True)
        client, link = rig.newcomer()
        client.says("connect Wizard wrong\r\n")
        link.says("Last connect was from h on x\n")         # he has had it printed in the game
        session = client.session
        self.assertEqual(session.character.proven, b"")
        rig.post(rig.hub.on_checked, *rig.beat.checks[-1][:2], [False])
        self.assertEqual((session.character.login, session.character.proven,
                          session.character.trials, session.character.pending),
                         (None, b"", [], None))


class LoginBrake(RigCase):
    FREE = has.LoginBrake.FREE

    def guesses(self, link):
        return link.lines().count("connect bob x")

    def test_many_logins_in_one_packet_go_on_one_by_one(self):
        rig = self.rig()
        for host in ("203.0.113.9", "2001:db8:1:2::1"):
            client, link = rig.newcomer(host=host)
            client.says("connect bob x\r\n" * 50)
            self.assertEqual(self.guesses(link), self.FREE)
            for wait in (3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 30):
                rig.pass_time(wait - 0.1)
                self.assertEqual(self.guesses(link), 0)
                rig.pass_time(0.2)
                self.assertEqual(self.guesses(link), 1)

    def test_a_new_connection_is_braked_too(self):
        rig = self.rig()
        for expected in (1, 1, 1, 0):
            client, link = rig.newcomer()
            client.says("connect bob x\r\n")
            self.assertEqual(self.guesses(link), expected)
            if expected:
                client.hangs_up()
        rig.pass_time(3.1)
        self.assertEqual(self.guesses(link), 1)

    def test_names_without_a_password_are_tries_too(self):
        """PennMUSH counts them: ten, and it bars the address of all (worlds/pennmush.md h)."""
        for family in FAMILIES[1:]:
            rig, client, link = self.newcomer(family=family)
            client.says('connect bob\r\nconnect "bob\r\n' * 20)
            self.assertEqual(len(re.findall("connect .?bob", link.read().decode())), self.FREE)
            self.doCleanups()

    def test_a_guesser_with_a_character_of_his_own(self):
        rig = self.rig()
        for count in range(3):
            client, link = rig.newcomer()
            client.says("connect bob x\r\n")
            link.read()
        mallory, own = rig.newcomer()
        mallory.send("connect Mallory pw\r\n")
        rig.pass_time(3.1)
        rig.let_in(own)
        client.says("connect bob x\r\n" * 3)
        # his own took none of the guesses away: one in 3 s
        self.assertEqual(self.guesses(link), 1)
        rig.pass_time(5.9)
        self.assertEqual(self.guesses(link), 0)

    def test_who_mistyped_and_then_gets_in_keeps_nobody_waiting(self):
        rig, alice, link = self.newcomer()
        for password in ("a", "b", "pw"):
            alice.says(f"connect Alice {password}\r\n")
            if password != "pw":
                link.send("Either that player does not exist, or has a different password.\r\n")
        other, other_link = rig.newcomer()
        other.says("connect bob x\r\n")
        self.assertEqual(self.guesses(other_link), 0)
        asked = re.findall(rb"OUTPUTPREFIX (\S+)\r\n", link.read())
        link.says(b"Welcome\r\n" + asked[-1] + b"\r\n")
        self.assertEqual((state_of(alice), self.guesses(other_link)), ("PLAYING", 1))

    def test_a_login_that_waits_when_the_world_dies_is_tried_on_return(self):
        rig, client, _ = self.newcomer()
        client.says("connect bob x\r\n" * 3 + "connect Alice secret\r\nWHO\r\n")
        rig.down()
        self.assertNotIn(b"secret", client.read())
        rig.found("life 2")
        self.assertIn("connect Alice secret", rig.game.accept().lines())

    def test_logins_behind_a_logout_in_one_packet_wait_in_order(self):
        rig, alice, link = self.player("Alice")
        link.read()
        typed = [line for n in range(6) for line in (f"connect bob x{n}", f"WHO {n}")]
        alice.send("LOGOUT\r\n" + "".join(line + "\r\n" for line in typed[:9]))
        alice.says(b"\xff\xf1" + "".join(line + "\r\n" for line in typed[9:]).encode())
        read = []
        for wait in (0.1, 3, 6, 9):
            rig.pass_time(wait)
            lines = link.read().replace(b"\xff\xf1", b"").decode().split("\r\n")
            read.append([line for line in lines if line in typed])
        self.assertEqual(read, [typed[:6], typed[6:8], typed[8:10], typed[10:]])

    def test_logins_typed_before_the_link_is_open_are_braked_too(self):
        rig = self.rig(up=False)
        client = rig.client()
        client.says("connect bob x\r\n" * 50)
        rig.found("life 1")
        self.assertEqual(self.guesses(rig.game.accept()), self.FREE)

    def test_the_brake_holds_over_an_upgrade(self):
        rig, client, link = self.newcomer()
        client.says("connect bob x\r\n" * 7)
        self.assertEqual(self.guesses(link), self.FREE)
        rig.upgrade()
        client.sock.shutdown(socket.SHUT_WR)
        rig.settle()
        self.assertEqual((state_of(client), self.guesses(link)), ("LOGIN", 0))
        rig.pass_time(3.1, 6.1, 9.1, 12.1, 12.1)
        self.assertEqual((self.guesses(link), link.ended), (4, True))
        client = rig.client()
        client.says("connect bob x\r\n")
        self.assertEqual(self.guesses(rig.game.accept()), 0)

    def test_another_address_of_the_same_64_is_the_same_guesser(self):
        rig = self.rig()
        rig.client(host="2001:db8:1:2::1").says("connect bob x\r\n" * 4)
        self.assertEqual([rig.hub.logins.left(host)
                          for host in ("2001:db8:1:2::2", "2001:db8:1:3::2")], [0, self.FREE])


class Lobby(RigCase):
    """Connections that are no sessions yet, or not any more: bounded for each port and host."""

    def arrive(self, rig, host, tls=False):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        rig.hub.door.on_accept(theirs, host, tls)
        peer = Peer(ours, rig.settle)
        rig.settle()
        return peer

    def front(self, **settings):
        return self.rig(proxy_from="192.0.2.1", **settings)

    def test_silent_arrivals_make_room_for_newer_ones_of_their_port_only(self):
        rig = self.front(max_clients=100)
        silent = [self.arrive(rig, "192.0.2.1") for _ in range(130)]
        self.assertEqual(len(rig.hub.door.arrivals), 100)
        self.assertEqual([peer.read() is not None and peer.ended for peer in silent],
                         [True] * 30 + [False] * 100)
        plain = rig.client()
        self.assertEqual(state_of(plain), "LOGIN")
        late = self.arrive(rig, "192.0.2.1")
        late.says("PROXY TCP6 ::ffff:198.51.100.1 ::1 1 2\r\nWHO\r\n")
        self.assertEqual(list(rig.hub.sessions.values())[-1].host, "198.51.100.1")

    def test_a_front_that_says_nothing_has_a_client_of_its_own(self):
        rig = self.front()
        self.arrive(rig, "192.0.2.1")
        rig.pass_time(0.5)
        self.assertEqual(len(rig.hub.sessions), 0)
        rig.pass_time(0.3, 0.3, 0.3)
        self.assertEqual([it.host for it in rig.hub.sessions.values()], ["192.0.2.1"])

    def test_what_comes_with_the_header_is_read_once(self):
        for kept in (False, True):
            for head in ("PROXY TCP4 198.51.100.1 127.0.0.1 1 2\r\n", ""):
                for more in ("", "WHO\r\nINFO\r\n"):
                    with self.subTest(kept=kept, head=head, more=more):
                        rig = self.front()
                        rig = rig.keep() if kept else rig
                        peer = self.arrive(rig, "192.0.2.1")
                        peer.says(head + "connect Al")
                        rig.pass_time(1)
                        link = rig.game.accept()
                        peer.says("ice secret\r\n" + more)
                        rig.settle()
                        self.assertFalse(peer.ended)
                        typed = [it for it in link.lines() if "OUTPUT" not in it]
                        self.assertEqual(typed, ["connect Alice secret", *more.split()])

    def test_a_header_that_was_begun_has_its_time(self):
        rig = self.front()
        peer = self.arrive(rig, "192.0.2.1")
        peer.send("PROXY TCP4 ")
        rig.pass_time(*[0.5] * 6)
        peer.says("198.51.100.1 127.0.0.1 1 2\r\n")
        self.assertEqual([it.host for it in rig.hub.sessions.values()], ["198.51.100.1"])
        peer = self.arrive(rig, "192.0.2.1")
        peer.send("PROXY TCP4 ")
        rig.pass_time(*[0.5] * 24)
        peer.read()
        self.assertEqual((len(rig.hub.sessions), peer.ended, len(rig.hub.door.arrivals)),
                         (1, True, 0))

    def test_a_broken_header_is_not_served(self):
        rig = self.front()
        peer = self.arrive(rig, "192.0.2.1")
        peer.says("PROXY TCP4 nobody 127.0.0.1 1 2\r\nWHO\r\n")
        peer.read()
        self.assertEqual((peer.ended, len(rig.hub.sessions)), (True, 0))

    def test_a_proxy_line_of_somebody_who_is_no_front_is_warned_of_once(self):
        rig = self.rig()
        with self.assertLogs(has.log, "WARNING") as logged:
            for head in (b"PROXY TCP4 1.2.3.4 127.0.0.1 1 2\r\n", TestProxyHeader.version_2(),
                         b"PROXY UNKNOWN\r\n"):
                rig.client().says(head)
        warned = [line for line in logged.output if "proxy_from" in line]
        self.assertEqual(len(warned), 1, logged.output)

    def test_who_is_refused_reads_why(self):
        """Also if he has typed already: a close with unread bytes would be a reset, which takes the
        notice away."""
        rig = self.rig(max_clients=1)
        rig.client(tcp=True)
        refused = rig.client(tcp=True)
        refused.says("connect Alice pw\r\n")
        self.assertEqual(refused.lines(),
                         ["# NOTICE # Too many users are connected now. Please try again later."])
        self.assertTrue(refused.ended)
        refused.hangs_up()
        self.assertEqual(len(rig.hub.door.refused), 0)

    def test_who_is_refused_and_stays_is_closed(self):
        rig = self.rig(max_clients=1)
        rig.client()
        for _ in range(150):
            rig.client()
        self.assertEqual(len(rig.hub.door.refused), has.Refused.MOST)
        rig.pass_time(*[0.5] * 12)
        self.assertEqual(len(rig.hub.door.refused), 0)


class TestQuietLog(unittest.TestCase):
    def test_once_a_minute_for_each_address(self):
        timers = []
        quiet = has.QuietLog(lambda seconds, call: timers.append((seconds, call)))
        with self.assertLogs(has.log, "INFO") as logged:
            for host in ("203.0.113.1", "203.0.113.2"):
                for _ in range(1000):
                    quiet.note(host, "refused: full")
            for number in range(1000):
                quiet.note(f"198.51.{number // 250}.{number % 250}", "refused: full")
            (seconds, call), = timers
            call()
        said = [line.partition(":has:")[2] for line in logged.output]
        self.assertEqual((seconds, len(said)), (60, 2 + 98 + 2 + 1))
        self.assertIn("clients from 203.0.113.2 refused: full: 999 more in the last minute", said)
        self.assertIn("902 more such lines in the last minute, about other addresses", said)


class StrangersInTheLog(RigCase):
    """Whatever strangers do, the log grows by a bounded number of lines a minute."""

    def log_of(self, rig, act):
        with self.assertLogs(has.log, "INFO") as logged:
            act()
            rig.pass_time(60.1)
        return [line.partition(":has:")[2] for line in logged.output]

    def test_short_visits(self):
        rig = self.rig(up=False)

        def visits():
            for _ in range(300):
                client = rig.client()
                client.says("x")
                client.hangs_up()
        said = self.log_of(rig, visits)
        self.assertEqual(len(said), 2 * 60 + 1)
        self.assertIn("clients from 203.0.113.9 connected and spoke or stayed: 240 more in the "
                      "last "
                      "minute", said)

    def test_logins_that_are_refused(self):
        rig = self.rig()
        client = rig.client(host="127.0.0.1")            # a web client's: no brake slows it down
        link = rig.game.accept()

        def guesses():
            for _ in range(300):
                client.says("connect Wizard wrong\r\n")
                rig.let_in(link, None)
        said = self.log_of(rig, guesses)
        self.assertEqual(len([line for line in said if "world refused a login" in line]), 60)
        self.assertIn("clients from 127.0.0.1 were refused a login: 240 more in the last minute",
                      said)

    def test_who_logs_in_and_out_for_ever(self):
        rig, client, link = self.player(host="127.0.0.1")

        def round_and_round():
            for _ in range(400):
                client.says("@name me=[x]\r\nLOGOUT\r\n")
                self.assertEqual(state_of(client), "LOGIN")
                client.says("connect Alice pw\r\n")
                rig.let_in(link)
        said = self.log_of(rig, round_and_round)
        counts = [len([line for line in said if what in line])
                  for what in (": logged in", ": uses softcode", ": logged out")]
        self.assertEqual(counts, [299, 60, 300])     # the first was before

    def test_many_ordinary_users_are_all_in_it(self):
        rig = self.rig(up=False)

        def users():
            for number in range(150):
                rig.client(host=f"203.0.113.{number}").send("x")
            rig.settle()
        self.assertEqual(len([line for line in self.log_of(rig, users) if "connected" in line]),
                         150)

    def test_lines_that_would_hand_over_an_address(self):
        rig = self.rig("rhostmush")
        client = rig.client()
        client.send("PROXY TCP4 6.6.6.6 1.1.1.1 1 2\r\n" * 500)
        said = self.log_of(rig, rig.settle)
        self.assertLess(len([line for line in said if "hands over addresses" in line]), 3)

    def test_the_brake_does_not_keep_long_names(self):
        brake = has.LoginBrake()
        brake.count("203.0.113.9", b"n" * 7000, 0)
        self.assertLess(len(repr(brake.tries)), 200)
        brake.forgive("203.0.113.9", b"n" * 7000)
        self.assertEqual(brake.tries, {})


class Listeners(RigCase):
    def test_the_old_ones_stay_where_a_new_port_is_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = free_port()
            rig = self.rig(local_address="", local_port=port)
            rig.hub.door.listen()
            before = [listener.sock.getsockname() for listener in rig.hub.door.listeners]
            rig.hub.settings = settings_of((("local_address", "127.0.0.1"),
                                            ("local_port", taken.getsockname()[1])))
            with self.assertRaises(OSError):
                rig.hub.door.listen()
            self.assertEqual([listener.sock.getsockname() for listener in rig.hub.door.listeners],
                             before)
            socket.create_connection(("127.0.0.1", port), 5).close()

    def test_a_tls_client_of_a_listener_that_should_be_gone_disturbs_nobody(self):
        rig = self.rig()
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        rig.hub.door.on_accept(theirs, "203.0.113.9", True)
        self.assertEqual((ours.recv(1), len(rig.hub.door.arrivals)), (b"", 0))

    def test_a_fault_in_letting_a_client_in_ends_that_client(self):
        rig = self.rig(local_address="127.0.0.1", local_port=0)
        rig.hub.door.listen()
        rig.hub.door.on_accept = lambda *_: 1 / 0
        with socket.create_connection(rig.hub.door.listeners[0].sock.getsockname(), 5) as client:
            rig.settle(lambda: select.select([client], [], [], 0)[0])
            self.assertEqual(client.recv(1), b"")


class OtherAddresses(RigCase):
    def test_why_another_address_does_not_answer_says_nothing_of_this_world(self):
        rig, first, link = self.player()
        second, _ = rig.player("Bob")
        rig.heard("lost", "booted", False)
        link.hangs_up()
        rig.heard("unreachable", AWAY, "refused", False)
        self.assertEqual((state_of(first), state_of(second)), ("ASKING", "PLAYING"))
        rig.heard("unreachable", HOME, "refused", False)
        self.assertEqual((state_of(first), state_of(second)), ("WAITING", "WAITING"))


class ManyAtOnce(RigCase):
    """What concerns thousands is done in turns: nobody waits for all of them."""

    def crowd(self, count=30):
        """(rig, clients, links) of a hub to which each look at the clock costs a millisecond."""
        rig = self.rig()
        pairs = [rig.player(f"u{number}") for number in range(count)]

        def clock():
            rig.clock.advance(0.001)
            return rig.clock()
        rig.hub.clock = clock
        return rig, [client for client, _ in pairs], [link for _, link in pairs]

    @staticmethod
    def waiting(clients):
        return sum(state_of(client) == "WAITING" for client in clients)

    def test_all_are_told_that_the_world_is_down_in_turns(self):
        rig, clients, _ = self.crowd()
        rig.hub.mailbox.post(rig.hub.heard, "lost", "no answer", True)
        rig.hub.turn(0)
        told = self.waiting(clients)
        self.assertTrue(0 < told < 25, told)    # the turn has two looks at it
        rig.settle()
        self.assertEqual([client.lines() for client in clients], [["# OFFLINE"]] * 30)

    def test_the_world_is_back_before_all_are_told(self):
        """Who is in its new life already is not torn out of it; all the others come back."""
        rig, clients, links = self.crowd()
        rig.hub.mailbox.post(rig.hub.heard, "lost", "no answer", True)
        rig.hub.turn(0)
        links[-1].sock.close()                  # his turn to be told is far
        world = has.World(HOME, rig.game.target, rig.family, "life 2", False, False)
        rig.hub.mailbox.post(rig.hub.on_world_found, world)
        rig.life = "life 2"
        session, told = clients[-2].session, []
        session.life = "life 2"                 # he is back, however that went
        rig.settle()
        self.assertEqual(state_of(clients[-2]), "PLAYING")
        self.assertEqual(clients[-2].lines(), told)
        self.assertEqual({state_of(client) for client in clients[:-2] + clients[-1:]},
                         {"RETURNING"})

    def test_the_status_is_made_in_turns(self):
        rig, clients, _ = self.crowd(60)
        told, logged = [], []
        rig.hub.control.command({"do": "status"}, told.append)
        rig.hub.turn(0)
        self.assertEqual(told, [])
        rig.settle()
        self.assertEqual([it["name"] for it in json.loads(told[0])["sessions"]],
                         [f"u{number}" for number in range(60)])
        with mock.patch.object(has.log, "info", lambda form, line: logged.append(line)):
            rig.hub.control.log_status()
            for _ in range(7):
                rig.hub.turn(0)
            self.assertTrue(0 < len(logged) < 60, len(logged))
            rig.settle()
        self.assertEqual(len(logged), 63)
        self.assertIn("up", logged[0])
        self.assertEqual([line.split()[1] for line in logged[3:]], [f"u{n}" for n in range(60)])

    def test_who_is_about_to_be_told_is_told_when_his_link_ends(self):
        rig, clients, links = self.crowd(60)
        rig.hub.mailbox.post(rig.hub.heard, "lost", "no answer", True)
        rig.hub.turn(0)
        clients[59].send("QUIT\r\n")
        rig.hub.turn(0)
        for link in links[55:]:
            link.sock.close()
        self.assertEqual([state_of(client) for client in clients[55:]], ["PLAYING"] * 5)
        rig.hub.turn(0)
        self.assertEqual([state_of(client) for client in clients[55:]],
                         ["WAITING"] * 4 + ["CLOSING"])
        rig.settle()
        self.assertEqual([client.lines() for client in clients[:59]], [["# OFFLINE"]] * 59)
        self.assertEqual(rig.beat.asks, [])

    def test_what_the_heartbeat_says_comes_before_many_ends(self):
        rig, clients, links = self.crowd(30)
        with mock.patch.object(has, "BURDEN_A_TURN", 3):
            for link in links:
                link.sock.close()
            rig.hub.mailbox.post(rig.hub.heard, "lost", "no answer", True)
            rig.hub.turn(0)
            self.assertEqual(sum(state_of(client) == "ASKING" for client in clients), 0)
            self.assertGreater(self.waiting(clients), 3)
            rig.settle()
        self.assertEqual([client.lines() for client in clients], [["# OFFLINE"]] * 30)

    def test_links_that_end_together_keep_nobody_waiting_for_all_of_them(self):
        rig, clients, links = self.crowd(40)
        with mock.patch.object(has, "BURDEN_A_TURN", 10):
            for link in links[:39]:
                link.sock.close()
            rig.hub.turn(0)
            asking = sum(state_of(client) == "ASKING" for client in clients)
            self.assertEqual(asking, 10)
            clients[39].send("say hello\r\n")
            rig.hub.turn(0)
            self.assertEqual(sum(state_of(client) == "ASKING" for client in clients), 20)
            self.assertIn(b"say hello", links[39].read())
            rig.settle()
        self.assertEqual(sum(state_of(client) == "ASKING" for client in clients), 39)

    def test_all_that_changes_at_once_is_written_down_in_turns(self):
        rig, clients, _ = self.crowd(60)
        rig.hub.scribe = scribe = mock.Mock()
        rig.hub.changed.update([client.session for client in clients] + [rig.hub])
        while rig.hub.changed:
            rig.hub.turn(0)
        rig.hub.scribe = None
        written = [call[0][0] for call in scribe.write.call_args_list]
        self.assertEqual([len(it) for it in written], [26, 25, 10])
        self.assertIs(written[0][0], rig.hub)   # what was ordered does not wait
        self.assertEqual({it for part in written for it in part},
                         {client.session for client in clients} | {rig.hub})

    def test_timers_that_are_due_together(self):
        rig, ran = self.rig(), []
        rig.hub.clock = self.crowd(0)[0].hub.clock
        rig.hub.now = rig.hub.clock()
        for number in range(30):
            rig.hub.later(0, ran.append, number)
        rig.hub.turn(0)
        self.assertTrue(0 < len(ran) < 12, ran)
        while len(ran) < 30:
            rig.hub.turn(0)
        self.assertEqual(ran, list(range(30)))

    def test_a_stop_that_the_log_tells_of_is_a_stop_whatever_comes(self):
        rig, is_meant = self.rig(), []
        rig.hub.scribe = mock.Mock()
        with mock.patch.object(has.log, "info", lambda *_: is_meant.append(
                rig.hub.scribe.farewell.called)):
            rig.hub.stop()
        rig.hub.scribe = None
        self.assertTrue(is_meant[0])

    def test_a_goodbye_comes_before_the_end(self):
        rig, clients, _ = self.crowd()
        rig.hub.stop()
        rig.settle()
        rig.pass_time(*[0.1] * 20)
        self.assertFalse(rig.hub.sessions)
        for client in clients:
            self.assertEqual(client.lines(), [RARE_NOTICES["goodbye_notice"]])
            self.assertTrue(client.ended)

    def test_who_has_left_is_not_called(self):
        rig, clients, _ = self.crowd(2)
        rig.hub.sweep([(clients[1].session.end, ())])
        rig.hub.sweep(iter([]))
        rig.hub.each("screen.notify", "# HELLO")
        self.assertEqual([client.lines() for client in clients], [["# HELLO"], []])

    def test_sessions_that_have_ended_are_no_garbage_to_search_for(self):
        rig = self.rig()
        gc.collect()
        gc.disable()
        try:
            for number in range(3):
                client, link = rig.player(f"u{number}")
                client.hangs_up()
            rig.peers.clear()
            del client, link
            rig.pass_time(20, 700, has.FORGOTTEN_SECONDS + 1)
            left = [it for it in gc.get_objects()
                    if isinstance(it, (has.Session, has.Part, has.Stream))]
        finally:
            gc.enable()
        self.assertEqual(left, [])


class Turns(RigCase):
    def test_a_timer_set_by_a_timer_runs_in_the_next_turn(self):
        rig, ran = self.rig(), []

        def again():
            ran.append(1)
            rig.hub.later(0, again)
        rig.hub.later(0, again)
        for count in range(1, 4):
            rig.hub.turn(0)
            self.assertEqual(len(ran), count)
        rig.hub._timers.clear()

    def test_a_few_links_a_turn(self):
        rig = self.rig(up=False)
        clients = [rig.client() for _ in range(20)]
        rig.hub.mailbox.post(rig.hub.on_world_found,
                             has.World(HOME, rig.game.target, rig.family, "life 1", False, False))
        opened = []
        while len(opened) < 9 and (not opened or opened[-1] < 20):
            rig.hub.turn(0)
            opened.append(sum(client.session.link is not None for client in clients))
        self.assertEqual([n for n in opened if n], [8, 16, 20])

    def test_a_hold_that_hup_brings_counts_for_those_who_wait(self):
        rig, client, _ = self.player(hold=0, login_hold=0)
        rig.down()
        rig.pass_time(50)
        rig.hub.settings = settings_of((("hold", 100),))
        rig.pass_time(49)
        self.assertEqual(state_of(client), "WAITING")
        rig.pass_time(12)
        self.assertIn(state_of(client), ("CLOSING", "gone"))

    def test_nobody_is_told_that_the_world_is_offline_while_it_is_up(self):
        rig = self.rig(resume_rate=0.001, hold=100)
        rig.pass_time(1001)
        client, _ = rig.player()
        rig.down()
        rig.pass_time(90)
        rig.found("life 2")
        rig.pass_time(20)
        self.assertEqual((state_of(client), client.lines()), ("WAITING", ["# OFFLINE"]))


class Orders(RigCase):
    """What admins have done by the control socket."""

    @staticmethod
    def order(rig, do, **request):
        """What came of it: the text of "done" or "error"."""
        answer = rig.hub.control.command({"do": do, **request}, None)
        rig.settle()
        return answer.get("done") or answer["error"]

    def test_maintenance_is_told_with_offline_until_the_world_is_back(self):
        rig, alice, _ = self.player(still_offline_every=90)
        self.assertEqual(self.order(rig, "maintenance", text="Back at 18:00 \x1b[2J"),
                         "shown when the world is down, and until it is back")
        words = "# NOTICE # Back at 18:00 ?[2J"
        self.assertEqual(alice.lines(), [])
        rig.down()
        self.assertEqual(alice.lines(), ["# OFFLINE", words])
        rig.upgrade()
        newcomer = rig.client()
        self.assertEqual(newcomer.lines(), ["# OFFLINE", words])
        rig.pass_time(89)
        self.assertEqual(alice.lines(), [])
        rig.pass_time(1.5)
        still, more = alice.lines()
        self.assertRegex(still, r"OFFLINE for \w+\. Still waiting")
        self.assertEqual(more, words)
        self.assertIn("maintenance: Back at 18:00 ?[2J", has.status_lines(rig.status()))
        rig.found("life 2")
        rig.down()
        self.assertEqual(rig.client().lines(), ["# OFFLINE"])
        self.assertEqual(rig.status()["maintenance"], "")

    def test_the_status_says_where_the_heartbeat_is(self):
        for family, blind, where in (("tinymux", False, "heartbeat logged in"),
                                     ("tinymux", True, "heartbeat at the login screen"),
                                     ("plain", False, "connected, without a login")):
            rig = self.rig(family)
            rig.hub.health.world = rig.hub.world._replace(blind=blind)
            status = rig.hub.control.status()
            self.assertEqual(status["world"]["heartbeat"], where)
            without = " (without heartbeat login)" if blind else ""
            self.assertIn(f"is up{without} for", has.status_lines(status)[0])

    def test_maintenance_begun_and_ended_while_the_world_is_down(self):
        rig, alice, _ = self.player(offline_notice="")
        rig.down()
        self.assertEqual(self.order(rig, "maintenance", text="Moving house"),
                         "shown until the world is back; told 1 user")
        self.assertEqual(alice.lines(), ["# NOTICE # Moving house"])
        self.assertEqual(self.order(rig, "maintenance", text="OFF"), "off")
        self.assertEqual((alice.lines(), rig.client().lines()), ([], []))

    def test_how_often_who_waits_is_told(self):
        for every, times in ((0, 0), (5, 120), (30, 20), (90, 6), (300, 2)):
            with self.subTest(every=every):
                rig, alice, _ = self.player(still_offline_every=every)
                rig.down()
                rig.pass_time(*[1] * 601)
                told = [line for line in alice.lines() if "Still waiting" in line]
                self.assertAlmostEqual(len(told), times, delta=1)

    def test_kick_by_number_character_or_address(self):
        for who, gone in (("1", ["Alice"]), ("bob", ["Bob", "bob"]), ("2001:DB8:0::7", ["Carol"]),
                          ("203.0.113.9", ["Alice", "Bob", "bob"]), ("4", ["Carol"])):
            with self.subTest(who=who):
                rig = self.rig(kick_reason_notice="# Why: {reason}")
                names = ["Alice", "Bob", "bob", "Carol"]
                peers = [rig.player(name, host="2001:db8::7" if name == "Carol"
                                    else "203.0.113.9")[0]
                         for name in names]
                said = self.order(rig, "kick", who=who, reason="Too \x1bloud")
                self.assertIn(f" {gone[0]}@", said)
                notices = ["# NOTICE # You were disconnected by an administrator.",
                           "# Why: Too ?loud"]
                self.assertEqual([name for name, peer in zip(names, peers)
                                  if peer.lines()[-2:] == notices], gone)
                self.assertEqual(sum(state_of(peer) == "PLAYING" for peer in peers), 4 - len(gone))
                self.assertEqual(self.order(rig, "kick", who=who, reason=None),
                                 f"there is no {who}: see --status")

    def test_kick_of_one_who_is_away(self):
        rig, client, link = self.player(tcp=True, reattach=300)
        client.sock.close()
        rig.settle(lambda: rig.hub.places)
        self.assertIn("closed: session 1 Alice@", self.order(rig, "kick", who="alice"))
        self.assertEqual((len(rig.hub.sessions), len(rig.hub.places)), (0, 0))
        link.read()
        self.assertTrue(link.ended)

    DENIED = "# NOTICE # This world takes no connections from your address."

    def test_what_was_ordered_is_written_down_before_that_is_said(self):
        """A kill -9 just behind it forgets nothing."""
        rig = self.rig()
        for request in ({"do": "deny", "address": "10.0.0.0/8"},
                        {"do": "maintenance", "text": "x"}):
            ours, theirs = socket.socketpair()
            self.addCleanup(theirs.close)
            rig.hub.scribe, written = mock.Mock(), []
            caller = has.Caller(rig.hub, ours)
            caller.answer = lambda answer: written.append(
                rig.hub.scribe.write.call_args_list[0][0][0])
            theirs.send(json.dumps(request).encode() + b"\n")
            rig.settle()
            rig.hub.scribe = None
            self.assertEqual(written, [(rig.hub,)])

    def test_deny_by_the_settings(self):
        rig = self.rig()
        (alice, _), (bob, _) = rig.player("Alice"), rig.player("Bob", host="2001:db8::7")
        denied = settings_of(tuple(sorted({"deny": "203.0.113.0/24, 2001:db8:5::/64"}.items())))
        rig.hub.reload._load = lambda: (denied, [])
        rig.hub.reload.run()
        rig.settle()
        self.assertEqual((alice.lines(), alice.ended), ([self.DENIED], True))
        self.assertEqual(state_of(bob), "PLAYING")
        for host, let_in in (("203.0.113.77", False), ("::ffff:203.0.113.77", False),
                             ("2001:db8:5::9", False), ("2001:db8:6::9", True),
                             ("203.0.114.1", True)):
            with self.subTest(host=host):
                client = rig.client(str(has.address_of(host)))
                self.assertEqual(client.session is not None, let_in)
                if not let_in:
                    self.assertEqual((client.lines(), client.ended), ([self.DENIED], True))

    def test_deny_for_a_while_over_an_upgrade_and_no_more(self):
        rig, alice, _ = self.player()
        self.assertEqual(self.order(rig, "deny", address="203.0.113.9", seconds=3600),
                         "nobody comes in from 203.0.113.9/32 for 1h 0m; closed: 1 user")
        self.assertEqual(alice.lines(), [self.DENIED])
        self.assertEqual(self.order(rig, "deny", address="::ffff:198.51.100.0/120"),
                         "nobody comes in from 198.51.100.0/24 until HAS stops; closed: 0 users")
        rig.upgrade()
        self.assertRegex("\n".join(has.status_lines(rig.status())),
                         r"denied: 203.0.113.9/32 for 59m \d+s, 198.51.100.0/24 until HAS stops")
        for host in ("203.0.113.9", "198.51.100.200"):
            self.assertEqual(rig.client(host).lines(), [self.DENIED])
        with mock.patch("time.time", return_value=time.time() + 3601):
            self.assertEqual(rig.client("198.51.100.200").lines(), [self.DENIED])
            self.assertIsNotNone(rig.client().session)
        self.assertEqual(self.order(rig, "deny", address="198.51.100.0/24", seconds=0),
                         "198.51.100.0/24 may come in again")
        self.assertIsNotNone(rig.client("198.51.100.200").session)
        self.assertIn("is not denied", self.order(rig, "deny", address="::1", seconds=0))
        for seconds in (-1, float("nan"), 10 ** 400, "x", [], 1e300):
            with self.assertRaises(ValueError):
                self.order(rig, "deny", address="192.0.2.1", seconds=seconds)
        self.assertNotIn("192.0.2.1/32", rig.hub.control.status()["denied"])
        self.assertRaises(ValueError, self.order, rig, "deny", address="10.0.0.1/8")

    def test_a_denied_user_of_a_front_and_of_tls(self):
        """His address is known only behind the PROXY header, or the handshake."""
        rig = self.rig(proxy_from="127.0.0.1", deny="203.0.113.5")
        rig.hub.door.listen()
        port = rig.hub.door.listeners[0].sock.getsockname()[1]
        for host, said in (("203.0.113.5", self.DENIED + "\r\n"), ("203.0.113.6", "")):
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(f"PROXY TCP4 {host} 10.0.0.1 1 2\r\nhello\r\n".encode())
                rig.settle(lambda: rig.hub.door.refused or rig.hub.sessions)
                sock.settimeout(5)
                self.assertEqual(sock.recv(len(said)).decode(), said)

    def test_a_notice_to_one(self):
        rig = self.rig()
        (alice, _), (bob, _) = rig.player("Alice"), rig.player("Bob", host="2001:db8::7")
        lurker = rig.client()
        peers = {"alice": alice, "bob": bob, "lurker": lurker}
        lurker.read()
        for to, reached, done in (
                ("aLICE", {"alice"}, "told 1 user"),
                (str(bob.session.number), {"bob"}, "told 1 user"),
                ("2001:DB8::7", {"bob"}, "told 1 user"), (None, set(peers), "told 3 users"),
                ("203.0.113.9", {"alice", "lurker"}, "told 2 users"),
                ("Carol\x1b", set(), "nobody is here as Carol?: see --status")):
            with self.subTest(to=to):
                self.assertEqual(self.order(rig, "notice", text="Cake", to=to), done)
                self.assertEqual({name for name, peer in peers.items()
                                  if peer.lines()[-1:] == ["Cake"]}, reached)


class Outages(RigCase):
    """What is remembered of them, for --history and Prometheus."""

    @staticmethod
    def history(rig):
        """What --history --json tells."""
        return json.loads(json.dumps(rig.hub.control.command({"do": "history"}, None)))

    def test_who_was_in_who_is_back_and_who_is_not_and_why(self):
        rig = self.rig()
        names = ["Alice", "Bob", "Carol", "Dave", "Eve"]
        peers = {name: rig.player(name)[0] for name in names}
        rig.client()                            # at the login screen: has nothing to lose
        for _ in range(5):
            rig.game.peers.pop()
        rig.game.accept()
        with mock.patch("time.time", return_value=time.time() + 100) as now:
            rig.down()
            now.return_value += 30
            peers["Carol"].says("QUIT\r\n")
            peers["Dave"].hangs_up()
            self.assertEqual(self.history(rig)["waiting"], ["Alice", "Bob", "Eve"])
            rig.upgrade()                       # it survives, and who is awaited, too
            rig.found("life 2")
            now.return_value += 2
            links = {}
            for _ in range(4):
                link = rig.game.accept()
                rig.settle()
                asked = link.read()
                name = re.search(rb"connect (\w+)", asked)
                links[name and name.group(1).decode()] = link
                link.send(b"" if not name else b"Welcome\r\n%s\r\n" % re.search(
                    rb"OUTPUTPREFIX (=\w+=)", asked).group(1) if b"Bob" not in asked else
                    b"Either that player does not exist, or has a different password.\r\n")
                if b"INFO" in asked:
                    link.send("### Begin INFO\r\nVersion: MUX\r\n### End INFO\r\n")
                if b"Alice" in asked or b"Bob" in asked:
                    rig.settle()
            told = self.history(rig)
            outage, = told["outages"]
            self.assertEqual(told["waiting"], [])
            self.assertEqual((outage["seconds"], outage["users"], outage["back"], outage["why"]),
                             (30, 5, 2, "no answer"))
            self.assertEqual(outage["back_after"], 2)
            self.assertEqual(sorted(outage["absent"]), [
                ["Bob", "the world refused the login"], ["Carol", "quit while the world is down"],
                ["Dave", "the client left"]])
            lines = has.history_lines(told)
            self.assertEqual(len(lines), 3)
            self.assertRegex(lines[1],
                             r"\A\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  30s +5 +2  2s +no answer")
            self.assertIn("Carol (quit while the world is down)", lines[2])
            self.assertEqual((rig.hub.history.returns, rig.hub.history.failures), (2, 1))

    def test_again_before_all_were_back(self):
        rig = self.rig()
        rig.player("Alice")
        rig.down()
        self.assertEqual(has.history_lines(self.history(rig))[1:][-1], "    still waiting: Alice")
        self.assertRegex(has.history_lines(self.history(rig))[1], "until now +1 +0  - +no answer")
        rig.found("life 2")
        rig.down()
        first, second = self.history(rig)["outages"]
        self.assertEqual(first["absent"], [["Alice", "the world went down again"]])
        self.assertEqual((second["users"], second["absent"]), (1, []))

    def test_what_is_an_outage(self):
        rig = self.rig(up=False)
        rig.heard("unreachable", HOME, "refused", False)
        self.assertEqual(has.history_lines(self.history(rig)), ["no outage since HAS was started"])
        rig.found("life 1")
        self.assertEqual(self.history(rig)["outages"], [])
        rig.player("Alice")
        rig.found("life 2")                     # it was back before it was seen to be down
        rig.let_in(rig.game.accept())
        rig.found("life 3", rig.other, AWAY)
        rig.let_in(rig.other.accept())
        rig.heard("silent")             # no outage: nobody has lost anything
        rig.heard("answering")
        self.assertEqual([(it["why"], it["users"], it["back"], it["seconds"] is None)
                          for it in self.history(rig)["outages"]],
                         [("it was started anew", 1, 1, False), (f"moved to {AWAY}", 1, 1, False)])
        self.assertEqual(rig.status()["outages"]["count"], 1)

    def test_only_so_many_are_kept(self):
        history = has.History()
        for number in range(60):
            history.lost(number, "x", {it: f"u{it}" for it in range(60)})
            history.found()
        self.assertEqual([it["at"] for it in history.past_outages], list(range(10, 60)))
        self.assertEqual(len(history.past_outages[0]["absent"]), 50)
        self.assertEqual((history.past_outages[0]["users"], len(history.missing)), (60, 60))

    def test_prometheus(self):
        rig = self.rig(mush_address="unix:/a\"b\\c")
        (alice, link), (bob, _) = rig.player("Alice"), rig.player("Bob")
        before = rig.status()["bytes"]
        bob.hangs_up()
        rig.pass_time(11)
        self.assertEqual(len(rig.hub.sessions), 1)
        rig.upgrade()
        status = rig.status()
        self.assertEqual(status["bytes"], before)           # a counter never goes back
        rig.post(rig.hub.on_answers, [], rig.life, 0.0025)
        text = "\n".join(has.prometheus_lines(rig.status())) + "\n"
        sample = r'has_(\w+)\{world="unix:/a\\"b\\\\c"(?:,\w+="\w+")?\} [0-9.e+-]+\n'
        help_ = r"# HELP has_(\w+) .+\n# TYPE has_\1 (?:gauge|counter)\n"
        self.assertRegex(text, rf"\A(?:{help_}(?:{sample})+)+\Z")
        for line in ('has_world_up{W} 1', 'has_users{W,state="PLAYING"} 1',
                     'has_users{W,state="AWAY"} 0', 'has_round_trip_seconds{W} 0.0025',
                     'has_outages_total{W} 0', 'has_returns_total{W} 0',
                     f'has_bytes_total{{W,direction="in"}} {before["in"]}'):
            self.assertIn(line.replace("{W", '{world="unix:/a\\"b\\\\c"') + "\n", text)
        rig.down()
        self.assertIn("} 0\n", "\n".join(has.prometheus_lines(rig.status())[:3]) + "\n")


class OnEvent(RigCase):
    """on_event: somebody is told who does not look, and no program can disturb anybody."""

    TELL = "env | grep ^HAS_ >{0}/new.$$ && mv {0}/new.$$ {0}/$HAS_EVENT.$$"

    def setUp(self):
        self.folder = new_folder(self)
        os.environ["NOTIFY_SOCKET"], kept = "/nonexistent", os.environ.get("NOTIFY_SOCKET")
        self.addCleanup(lambda: os.environ.pop("NOTIFY_SOCKET") if kept is None
                        else os.environ.update(NOTIFY_SOCKET=kept))
        self.seen = set()

    def rig_that_runs(self, shell_line, **settings):
        return self.rig(on_event=f"sh -c '{shell_line}'", **settings)

    def rig_that_tells(self, **settings):
        return self.rig_that_runs(self.TELL.format(self.folder), hb_pass="s3cret", **settings)

    def told(self, rig, count=1):
        """The environments of the next runs: {event: {name: value}}."""
        def new():
            return [it for it in os.listdir(self.folder)
                    if not it.startswith("new.") and it not in self.seen]
        rig.settle(lambda: len(new()) >= count)
        found = new()
        self.seen |= set(found)
        self.assertEqual(len(found), count)
        return {it.partition(".")[0]: dict(
            line.split("=", 1) for line in read_text(f"{self.folder}/{it}").splitlines())
                for it in found}

    def nothing_runs(self, rig):
        """No run is left and none is held."""
        rig.settle(lambda: not self.runs(rig))
        self.assertEqual(rig.hub.hook.held_events, {})

    @staticmethod
    def runs(rig):
        return [key for key in rig.hub.selector.get_map().values()
                if isinstance(getattr(key.data, "owner", None), has.HookRun)]

    def test_every_event_and_its_environment(self):
        rig = self.rig_that_tells()
        rig.player()
        rig.heard("silent")
        self.assertEqual(self.told(rig), {"silent": {
            "HAS_EVENT": "silent", "HAS_WORLD": str(HOME), "HAS_USERS": "1", "HAS_SECONDS": "10",
            "HAS_REASON": "no answer for 10 s"}})
        rig.heard("answering")
        up = self.told(rig)["up"]
        rig.hub.control.command({"do": "maintenance", "text": "Back soon"}, None)
        self.assertEqual((up["HAS_SECONDS"], up["HAS_REASON"]), ("10", "it answers again"))
        rig.pass_time(11)
        rig.down()
        self.assertEqual(self.told(rig)["down"]["HAS_REASON"], "no answer; maintenance: Back soon")
        rig.found("life 2 Sun Nov 22")
        self.assertEqual(self.told(rig)["up"]["HAS_REASON"], "tinymux, 2 Sun Nov 22")
        rig.found("life 3", rig.other, AWAY)
        moved = self.told(rig)["moved"]
        self.assertEqual((moved["HAS_WORLD"], moved["HAS_REASON"], moved["HAS_SECONDS"]),
                         (str(AWAY), f"from {HOME}", "0"))
        rig.found("life 3", rig.other, AWAY, shut=True)
        self.assertIn("mend hb_user and hb_pass", self.told(rig)["refused"]["HAS_REASON"])
        rig.found("life 3", rig.other, AWAY, shut=True)         # again: no news
        rig.pass_time(11)
        rig.found("life 4", rig.other, AWAY)    # it died and was back before that was seen
        both = self.told(rig, 2)
        self.assertEqual(both["down"]["HAS_REASON"], "it was started anew")
        self.assertEqual(set(both), {"down", "up"})
        self.nothing_runs(rig)

    def test_one_of_a_kind_in_ten_seconds_and_the_newest_of_those_held(self):
        rig = self.rig_that_tells()
        for life in ("life 2 second", "life 3 third", "life 4 fourth"):
            rig.restart(life)
        self.assertEqual(set(self.told(rig, 2)), {"down", "up"})
        self.assertEqual(set(rig.hub.hook.held_events), {"down", "up"})
        rig.pass_time(9)
        rig.upgrade()                           # what is held survives, and is told once
        self.assertEqual(set(rig.hub.hook.held_events), {"down", "up"})
        rig.post(has.Survival(rig.hub).go_on)   # as after an exec that failed
        rig.pass_time(10.1)
        self.assertEqual(self.told(rig, 2)["up"]["HAS_REASON"], "tinymux, 4 fourth")
        rig.pass_time(30)
        self.nothing_runs(rig)
        self.told(rig, 0)

    def test_a_start_is_no_event_but_a_world_that_is_not_there_is(self):
        rig = self.rig_that_tells()
        rig.heard("unreachable", HOME, "closed by the world", False)
        self.told(rig, 0)
        rig = self.rig_that_tells(up=False)
        rig.heard("unreachable", HOME, "Connection refused", False)
        self.assertEqual(self.told(rig)["down"]["HAS_REASON"], "Connection refused")

    def test_nothing_secret_and_nothing_of_systemd_s(self):
        rig = self.rig_that_runs("env >{0}/new && mv {0}/new {0}/down".format(self.folder),
                                 hb_pass="s3cret")
        rig.down()
        rig.settle(lambda: os.path.exists(self.folder + "/down"))
        shown = read_text(self.folder + "/down")
        self.assertIn("HAS_EVENT=down", shown)
        self.assertNotIn("s3cret", shown)
        self.assertNotIn("NOTIFY_SOCKET", shown)

    def trouble(self, shell_line="", count=1, **settings):
        """What is logged of a run, and its rig; nobody noticed anything."""
        rig = (self.rig_that_runs(shell_line, **settings) if shell_line else
               self.rig(**settings))
        client, link = rig.player()
        with self.assertLogs(has.log, "INFO") as logged:
            began = time.monotonic()
            rig.heard("silent")
            self.assertLess(time.monotonic() - began, 2)
            link.send("still here\r\n")
            rig.settle(lambda: b"still here" in client.read())
            rig.settle(lambda: not self.runs(rig))
            rig.pass_time(11)
            rig.heard("answering")
            rig.settle(lambda: not self.runs(rig))
        return [it for it in logged.output if "on_event" in it]

    def test_one_that_fails_is_logged_once_with_its_words(self):
        line, = self.trouble("echo \"no \033[2J route\"; exit 7")
        self.assertRegex(line, r"WARNING:has:on_event: nobody may have been told of silent: "
                         r"status 7; it said: no \?\[2J route; mend it; this is not said again")

    def test_one_that_works_again_is_logged(self):
        flag = self.folder + "/flag"
        lines = self.trouble(f"test -e {flag} || {{ touch {flag}; exit 1; }}")
        self.assertEqual([it.partition(": ")[0] for it in lines],
                         ["WARNING:has:on_event", "INFO:has:on_event"])

    def test_another_command_is_news(self):
        rig = self.rig(on_event="/nonexistent/one")
        with self.assertLogs(has.log, "WARNING") as logged:
            for command in ("one", "one", "two", "two"):
                rig.hub.settings = settings_of((("on_event", f"/nonexistent/{command}"),))
                rig.hub.hook.lost("down", 0, "gone")
                rig.settle(lambda: not self.runs(rig))
                rig.pass_time(11)
        self.assertEqual(len(logged.output), 2)

    def test_one_that_is_missing(self):
        line, = self.trouble(on_event="/nonexistent/wake")
        self.assertIn("it cannot be run: No such file or directory", line)

    def test_where_nothing_more_can_be_started(self):
        for what in ("socket.socketpair", "subprocess.Popen"):
            rig = self.rig(on_event="true")
            with mock.patch(what, side_effect=OSError(errno.EMFILE, "Too many open files")), \
                    self.assertLogs(has.log, "WARNING") as logged:
                before = open_descriptors()
                rig.hub.hook.lost("down", 0, "gone")
            self.assertEqual(open_descriptors(), before)
            self.assertIn("it cannot be run: Too many open files", logged.output[0])

    def test_one_that_hangs_is_killed_with_its_children(self):
        pids = self.folder + "/pids"
        with mock.patch.object(has.HookRun, "SECONDS", 1):
            line, = self.trouble(f"trap : TERM INT; sleep 77 & echo $! $$ >>{pids}; wait; sleep 77")
        self.assertIn("it was killed after 1 s", line)
        for pid in read_text(pids).split():
            self.wait_until(lambda: self.state_of(pid) in "ZX")

    @unittest.skipUnless(os.path.isdir("/proc/self"), "only /proc tells how many there are")
    def test_one_that_forks_for_ever(self):
        with mock.patch.object(has.HookRun, "MOST_PROCESSES", 20):
            line, = self.trouble("while :; do sleep 77 & done")
        self.assertIn("it was killed with more than 20 processes", line)

    @unittest.skipUnless(os.path.isdir("/proc/self"), "only /proc tells how many there are")
    def test_one_whose_children_fork_for_ever_behind_its_back(self):
        pids = self.folder + "/pids"
        with mock.patch.object(has.HookRun, "MOST_PROCESSES", 20):
            line, = self.trouble(
                f"(echo $$ >{pids}; while :; do sleep 77 & done) >/dev/null 2>&1 &")
        self.assertIn("it was killed with more than 20 processes", line)
        session = read_text(pids).strip()
        self.wait_until(lambda: not [pid for pid in filter(str.isdigit, os.listdir("/proc"))
                                     if self.state_of(pid, session) not in "ZX"])

    @staticmethod
    def state_of(pid, session=""):
        """The letter ps shows for a process (of that session); "" if there is none."""
        try:
            fields = read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
        except OSError:
            return ""
        return fields[0] if session in ("", fields[3]) else ""

    def wait_until(self, true):
        """What was killed may take a moment to die."""
        until = time.monotonic() + 5
        while not true():
            self.assertLess(time.monotonic(), until)
            time.sleep(0.01)

    def test_what_it_left_running_is_killed_in_the_end(self):
        """... which is no failure: it has done its part."""
        pids = self.folder + "/pids"
        with mock.patch.object(has.HookRun, "SECONDS", 1):
            self.assertEqual(self.trouble(f"sleep 77 >/dev/null 2>&1 & echo $! >{pids}"), [])
        pid = read_text(pids).strip()
        self.wait_until(lambda: self.state_of(pid) in "ZX")

    def test_one_that_floods_its_output(self):
        with mock.patch.object(has.HookRun, "SECONDS", 1):
            line, = self.trouble("yes flood")
        self.assertRegex(line, r"it was killed after 1 s; it said: (ood|[flood ])+; mend it")
        self.assertLess(len(line), 600)

    def test_what_it_leaves_running_may_finish(self):
        """A mail program may deliver behind the back of the one that was asked to."""
        self.assertEqual(self.trouble(f"(sleep 0.3; touch {self.folder}/sent) & exit 0"), [])
        self.assertTrue(os.path.exists(self.folder + "/sent"))

    def test_the_lines_of_the_readme(self):
        """Each as it stands there, with programs in the place of mail and curl."""
        text = (pathlib.Path(HERE) / "README.md").read_text()
        blocks = re.findall(r"(?m)^    (on_event = .*)\n        (.*)$", text)
        self.assertEqual([re.search("mail|ntfy|discord", " ".join(it)).group() for it in blocks],
                         ["mail", "ntfy", "discord"])
        for name in ("mail", "curl"):
            path = f"{self.folder}/{name}"
            with open(path, "w") as file:
                file.write(f'#!/bin/sh\n{{ printf "%s|" "$@"; [ $0 = {self.folder}/curl ] || cat; '
                           f'}}'
                           f" >{self.folder}/new; mv {self.folder}/new {self.folder}/told\n")
            os.chmod(path, 0o755)
        for line, target in blocks:
            rig = self.rig(**dict([(line + "\n    " + target).split(" = ", 1)]))
            with mock.patch.dict(os.environb, {
                    b"PATH": self.folder.encode() + b":" + os.environb[b"PATH"]}):
                rig.down()
            rig.settle(lambda: not self.runs(rig))
            told = read_text(self.folder + "/told").split("|")
            self.assertEqual([it for it in told if target in it], [target])
            self.assertTrue(re.search(rf"{HOME} down\b", "|".join(told)))
            self.assertTrue("no answer" in told[-1] or "no answer" in told[-3], told)
            os.unlink(self.folder + "/told")

    def test_commands_that_cannot_be(self):
        case = SettingsCase()
        case.setUp()
        self.addCleanup(case.doCleanups)
        for command, problem in (("./wake", "begins with no program"), ('"" x', "no program"),
                                 ("sh -c 'oops", "No closing quotation")):
            self.assertIn(problem, case.wrong(f"on_event = {command}")[0])
        settings, remarks = case.load("on_event = sh -c 'echo \"a  b\"; exit 1' x\n")
        self.assertEqual(settings.on_event, ["sh", "-c", 'echo "a  b"; exit 1', "x"])
        self.assertFalse([it for it in remarks if "on_event" in it])
        _, remarks = case.load("on_event = /nonexistent/wake me")
        self.assertIn("WARNING: on_event: /nonexistent/wake is no program that can be run: "
                      "nobody would be told", remarks)


class WordsOfTheSite(RigCase):
    """Every text that users read can be the site's own."""

    WORDS = dict(full_notice="Ple, \u00e9s nit", are_you_there_notice="S\u00ed <3",
                 login_kept_notice="Desat", unsent_more_notice="i {lines} m\u00e9s",
                 still_offline_notice="Fa {time}", kicked_notice="Fora",
                 list_heading_notice="n nom lloc estat edat quiet entra surt tls mida",
                 goodbye_notice="", login_brake_notice="Espera {seconds} segons")

    def waiting(self, **settings):
        rig, client, link = self.newcomer(host="203.0.113.9", **settings, **self.WORDS)
        rig.settle()
        return rig, client, link

    def test_while_the_world_is_down(self):
        rig, client, _ = self.waiting()
        rig.down()
        client.read()
        client.says(b"\xff\xf6")
        self.assertEqual(client.read(), "\r\nS\u00ed <3\r\n".encode())
        client.says("connect Alice secret\r\n" + "x\r\n" * 12)
        self.assertEqual(client.lines(), ["Desat"] + ["# UNSENT x"] * 10)
        rig.pass_time(1.1)
        self.assertEqual(client.lines(), ["# UNSENT i 2 m\u00c3\u00a9s"])         # UTF-8
        for _ in range(6):
            rig.pass_time(60)
        self.assertRegex(client.lines()[0], r"\AFa \d+s\Z")

    def test_refused_slowed_down_and_sent_away(self):
        rig, client, _ = self.waiting(max_clients=1)
        second = rig.client()
        # UTF-8
        self.assertEqual((second.lines(), second.ended), (["Ple, \u00c3\u00a9s nit"], True))
        client.says("connect Alice secret\r\n" * 4)
        self.assertEqual(client.lines(), ["Espera 3 segons"])
        rig.hub.control.command({"do": "kick", "who": client.session.number}, None)
        rig.settle()
        self.assertEqual(client.lines(), ["Fora"])

    def test_a_place_that_was_kept(self):
        words = {name: f"{name} {text}".strip() for name, text in (
            ("", "{time}"), ("from", "{old} {new}"), ("doubtful", ""), ("missed", "{lines}"),
            ("lost", "{lines}"), ("end", ""))}
        rig = self.rig(reattach=300, reattach_limit=4096, **{
            f"reattach_{name}_notice".replace("__", "_"): text for name, text in words.items()})
        client, link = rig.player(tcp=True, host="203.0.113.1")
        client.hangs_up()
        link.says(b"".join(b"line %04d\r\n" % number for number in range(2000)))
        again = rig.client(tcp=True, host="203.0.113.2")
        again.says("connect Alice pw\r\n")
        rig.pass_time(*SETTLED)
        lines = [line for line in again.lines() if not line.startswith("line ")]
        self.assertRegex("|".join(lines[-5:]), r"\A\d+s\|from 203\.0\.113\.1 203\.0\.113\.2\|"
                         r"lost \d+\|missed \d+\|end\Z")

    def test_no_text_for_users_is_outside_the_settings(self):
        tree, lines = ast.parse(pathlib.Path(HAS).read_text()), pathlib.Path(HAS).read_text()
        end = lines[:lines.index(has.END_MARK + " ----")].count("\n")
        self.assertEqual([f"line {node.lineno}: {node.value}" for node in ast.walk(tree)
                          if isinstance(node, ast.Constant) and isinstance(node.value, str)
                          and "NOTICE #" in node.value and node.lineno > end], [])

    def test_an_empty_text_says_nothing(self):
        rig, client, _ = self.waiting()
        client.read()
        rig.hub.stop()
        rig.settle()
        self.assertEqual((client.read(), client.ended), (b"", True))

    def test_without_any_text_nothing_is_said_in_a_whole_story(self):
        rig = self.rig(reattach=300, **{key: "" for key in has.SETTINGS if key.endswith("_notice")
                                        and key != "list_heading_notice"})
        (client, _), newcomer = rig.player(), rig.client()
        client.read()
        rig.heard("silent")
        client.says("say ice\r\n")
        rig.down()
        client.says("say x\r\n" * 30)
        client.says(bytes((IAC, AYT)))
        newcomer.says("connect Bob bobpw\r\n")
        rig.hub.control.command({"do": "maintenance", "text": "x"}, None)
        rig.pass_time(1.1, rig.hub.settings.still_offline_every)
        self.assertEqual((client.read(), newcomer.read()), (b"", b""))
        client.sock.close()
        rig.settle()
        back = rig.client()
        back.says("connect Alice alicepw\r\n")
        rig.pass_time(3)
        rig.hub.stop()
        rig.settle()
        self.assertEqual((back.read(), newcomer.read()), (b"", b""))

    def test_the_list_of_sessions(self):
        rig, client, _ = self.waiting()
        heading, row = has.listed(list(map(has.session_line, rig.status()["sessions"])),
                                  rig.hub.settings.list_heading_notice)
        self.assertEqual(heading, "    n nom              lloc                     estat      edat "
                                  "    quiet    entra    surt     tls mida")
        self.assertEqual([row[heading.index(word):].split(" ")[0] for word in ("lloc", "tls")],
                         ["203.0.113.9", "no"])


class Limits(RigCase):
    def accepted(self, rig, hosts):
        """For each host in turn: was it taken? The refused get one line and are closed."""
        found = []
        for host in hosts:
            client = rig.client(host=str(has.address_of(host)))
            found.append(client.session is not None)
            if not client.session:
                lines = client.lines()
                self.assertEqual((len(lines), client.ended), (1, True))
                self.assertIn("# NOTICE #", lines[0])
        return found

    def test_table(self):
        v4, v6 = "203.0.113.9", "2001:db8:1:2::%x"
        for name, settings, hosts, wanted in (
                ("no limits", {}, [v4] * 5, [1] * 5),
                ("max_clients", {"max_clients": 2}, [v4, v6 % 1, v4], [1, 1, 0]),
                ("max_per_host", {"max_per_host": 2}, [v4, v4, v4, "203.0.113.10"], [1, 1, 0, 1]),
                ("one /64", {"max_per_host": 1}, [v6 % 1, v6 % 2, "2001:db8:1:3::1"], [1, 0, 1]),
                ("mapped", {"max_per_host": 1}, [v4, "::ffff:" + v4, "::FFFF:203.0.113.10"],
                 [1, 0, 1]),
                ("scope", {"max_per_host": 1}, ["fe80::1%eth0", "fe80::2%eth0"], [1, 0]),
                ("loopback", {"max_per_host": 1}, ["127.0.0.1", "127.0.0.1", "::1", "::1"],
                 [1] * 4),
                ("mapped loopback", {"max_per_host": 1}, ["::ffff:127.0.0.1"] * 3, [1] * 3),
                ("proxies", {"max_per_host": 1, "proxy_from": "10.0.0.1, 2001:db8:1::/48"},
                 ["10.0.0.1"] * 3 + [v6 % 1] * 2, [1] * 5)):
            with self.subTest(name):
                self.assertEqual(self.accepted(self.rig(**settings), hosts),
                                 [bool(n) for n in wanted])

    def test_a_place_is_free_again(self):
        rig = self.rig(max_clients=1, max_per_host=1)
        for _ in range(3):
            client = rig.client()
            self.assertIsNotNone(client.session)
            client.hangs_up()
            rig.pass_time(10.1)

    def test_accept_failures_pause_the_listener_a_second(self):
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
                       errno.EPROTO, errno.EPERM):
            with self.subTest(errno.errorcode[number]):
                rig = self.rig()
                rig.hub.door.listen()
                (listener,) = rig.hub.door.listeners
                real, caller = listener.sock, socket.create_connection(listener.sock.getsockname())
                self.addCleanup(caller.close)
                failing = mock.Mock(wraps=real,
                                    accept=mock.Mock(side_effect=OSError(number, "planted")))
                failing.fileno = real.fileno
                rig.hub.selector.unregister(real)
                listener.sock = failing
                rig.hub.selector.register(failing, has.READ, listener)
                rig.settle()
                self.assertEqual(failing.accept.call_count, 1)
                NoSpinning.assert_idle(self, rig)
                rig.pass_time(0.9)
                self.assertEqual(failing.accept.call_count, 1)
                failing.accept = real.accept
                rig.pass_time(0.2)
                self.assertEqual(len(rig.hub.sessions), 1)


# ======================================================================
# What can be had of the program without a process of its own
#
# Telnet at length, the log, what the files promise each other.
# ======================================================================

class TestScannerAtLength(unittest.TestCase):
    def test_fuzz(self):
        import has
        rng = random.Random(secrets_seed())
        pool = [wild(rng) for _ in range(2000)]
        for _ in range(100000):
            stream = pool[int(rng.random() * 2000)] + pool[int(rng.random() * 2000)]
            cut = int(rng.random() * (len(stream) + 1))
            scanner = has.Scanner()
            pieces = scanner.feed(stream[:cut]) + scanner.feed(stream[cut:])
            self.assertEqual(b"".join(p for _, p in pieces) + scanner.held, stream)
            if _ % 20 == 0:
                found, rest = tokens(stream)
                self.assertEqual([p for yes, p in pieces if yes],
                                 [t for t in found if is_command(t)], stream)
                self.assertEqual(scanner.held, rest)


class TestPartsOfTheProgram(unittest.TestCase):
    """What can be had of part 9 without a process of its own."""

    def handler(self, path):
        """A LogHandler, and how to log one line by it."""
        handler = has.LogHandler(path)
        self.addCleanup(lambda: os.close(handler._fd))

        def say(text):
            handler.emit(logging.LogRecord("has", logging.INFO, "", 0, text, (), None))
        return handler, say

    def test_spans_of_time(self):
        for seconds, text in ((-5, "0s"), (0.9, "0s"), (61, "1m 1s"), (3661, "1h 1m"),
                              (90000, "1d 1h")):
            self.assertEqual(has.ago(seconds), text)

    def test_no_core_dump_where_a_pipe_ignores_the_limit(self):
        for pattern, limit in (("|/usr/lib/systemd/systemd-coredump %P", 1), ("core", 0), ("", 0)):
            with mock.patch("builtins.open", mock.mock_open(read_data=pattern)):
                self.assertEqual(has.core_limit(), limit)
        with mock.patch("builtins.open", side_effect=FileNotFoundError):
            self.assertEqual(has.core_limit(), 0)

    def test_a_text_of_the_command_line_under_an_ascii_locale(self):
        self.assertEqual(has.typed_text(b"caf\xc3\xa9".decode("ascii", "surrogateescape")),
                         "caf\u00e9")
        self.assertEqual(has.typed_text("caf\u00e9"), "caf\u00e9")

    def test_who_cannot_be_asked_is_told_apart(self):
        def told(path):
            with mock.patch("sys.stderr", io.StringIO()) as said:
                self.assertEqual(has.ask_running(options, path, {"do": "status"}), 3)
            return said.getvalue()
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as dead:
            usual, other = folder + "/has.sock", folder + "/other"
            options = types.SimpleNamespace(config=folder + "/has.conf", json=False)
            nobody = f"has.py: no HAS runs with {folder}/has.conf: nobody listens at "
            self.assertEqual(told(usual), f"{nobody}{usual}\n")
            dead.bind(other)
            self.assertEqual(told(other), f"{nobody}{other}; one that was started before "
                                          "control_socket was changed: by its PID only\n")
            with mock.patch.object(socket.socket, "connect", side_effect=PermissionError):
                self.assertIn("is only for the user who runs HAS, and for root", told(usual))

    def test_an_older_python_is_told_so(self):
        done = subprocess.run(
            [sys.executable, "-c", "import sys; sys.version_info = (3, 6, 8, 'final', 0); "
             f"exec(compile(open({HAS!r}, encoding='utf-8').read(), 'has.py', 'exec'))"],
            stderr=subprocess.PIPE, universal_newlines=True, timeout=20)
        self.assertEqual(done.returncode, 1)
        self.assertIn("has.py: HAS needs Python 3.8 or newer, and this is", done.stderr)

    def test_the_owner_of_a_socket_is_looked_at_before_it_is_believed(self):
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
            path = folder + "/has.sock"
            server.bind(path)
            server.listen(1)
            options = types.SimpleNamespace(script=path, config=path, json=False)
            with mock.patch.object(has, "owners_of", return_value={0, 12345}), mock.patch(
                "sys.stderr", io.StringIO()) as said:
                self.assertEqual(has.ask_running(options, path, {"do": "status"}), 3)
            self.assertRegex(said.getvalue(),
                             "belongs to user 12345, who may be anybody: not believed")

    def test_settings_that_a_new_file_brings_are_named_after_an_upgrade(self):
        ours, theirs = settings_of(()), settings_of((("admins", "Alice"), ("beat", 7)))
        with self.assertLogs(has.log, "WARNING") as logged:
            has.warn_of_differences(ours, lambda: (theirs, []))
        self.assertRegex(logged.output[0], "settings on disk are not those in force: (admins, "
                                           "beat|beat, admins);")
        with self.assertLogs(has.log, "WARNING") as logged:
            has.warn_of_differences(ours, mock.Mock(side_effect=has.SettingsError(["x:1: y"])))
        self.assertRegex(logged.output[0], "settings on disk cannot be used; .*: x:1: y")

    def test_usr2_without_memfd_is_refused(self):
        has.why_no_vault.cache_clear()
        self.addCleanup(has.why_no_vault.cache_clear)
        with mock.patch.object(has, "MEMORY_FILES",
                               False), self.assertLogs(has.log, "ERROR") as logged:
            has.Upgrade(types.SimpleNamespace(hub=None, vault=None), "has.py", "has.conf").begin()
        self.assertIn("no memory files", logged.output[0])

    def test_lines_that_nobody_reads_are_dropped_and_counted(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "pipe")
            os.mkfifo(path)
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            self.addCleanup(os.close, reader)
            _, say = self.handler(path)
            for number in range(5000):
                say(f"{number:0100}")
            read, last = os.read(reader, 1 << 20), 5000
            while b"dropped" not in read and last < 5100:
                say(f"{last:0100}")
                read, last = read + os.read(reader, 1 << 20), last + 1
        numbers = [int(number) for number in re.findall(rb"INFO (\d+)\n", read)]
        (dropped,) = re.findall(rb"^\((\d+) log lines were dropped\)$", read, re.M)
        self.assertEqual((int(dropped) + len(numbers), numbers[-1]), (last, last - 1))
        self.assertEqual(numbers, sorted(set(numbers)))
        self.assertEqual(numbers[:600], list(range(600)))           # more than the pipe holds

    def test_a_full_disk_tears_a_line_and_the_next_begins_anew(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "has.log")
            _, say = self.handler(path)
            real, room = os.write, [28, 0, 0]

            def write(fd, data):
                if room and not room[0]:
                    del room[0]
                    raise OSError(errno.ENOSPC, "No space left on device")
                size = min(room.pop(0), len(data)) if room else len(data)
                return real(fd, data[:size])
            with mock.patch.object(os, "write", write):
                for text in ("torn", "lost", "kept", "last"):
                    say(text)
            self.assertRegex(read_text(path), r"\A[-0-9: ]+ INFO tor\n\(2 log lines were "
                                              r"dropped\)\n.* kept\n.* last\n\Z")

    def test_a_log_file_that_cannot_be_opened_anew_costs_no_line(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "has.log")
            handler, say = self.handler(path)
            say("one")
            with mock.patch.object(has.log, "handlers", [handler]):
                handler.reload(settings_of((("log_file", "/nonexistent/has.log"),)))
            say("two")
            say("three")
            self.assertRegex(read_text(path),
                             r"\A.* one\n.* ERROR cannot open log_file /nonexistent/has\.log: .*\n"
                             r".* two\n.* three\n\Z")
            other = os.path.join(folder, "other.log")
            with mock.patch.object(has.log, "handlers", [handler]):
                handler.reload(settings_of((("log_file", other),)))
            say("four")
            self.assertRegex(read_text(path), f" three\n.* the log goes on in {other}\n\\Z")
            self.assertRegex(read_text(other), r"\A.* four\n\Z")

    def test_a_dead_terminal_stops_nobody(self):
        master, slave = pty.openpty()
        with mock.patch.object(os, "ttyname", return_value=os.ttyname(slave)):
            handler, say = self.handler("")
        os.close(slave)
        say("alive")
        self.assertIn(b"INFO alive", os.read(master, 1000))
        os.close(master)                        # every write is an error (EIO) from here on
        for _ in range(3):
            say("dead")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "has.log")
            handler.reload(settings_of((("log_file", path),)))
            say("on file")
            self.assertRegex(read_text(path),
                             r"\A\(3 log lines were dropped\)\n.* INFO on file\n\Z")


def parts_of_has():
    """has.py cut at its banners: [(title, first line, last line)]."""
    lines = pathlib.Path(HAS).read_text().split("\n")
    starts = [n for n, line in enumerate(lines, 1) if re.match(r"# \d+\. ", line)]
    return [(lines[start - 1][2:], start, end) for start,
            end in zip(starts, starts[1:] + [len(lines)])]


class TestFiles(unittest.TestCase):
    """What the files promise each other."""

    def read(self, name):
        return (pathlib.Path(HERE) / name).read_text()

    def test_the_list_of_parts_is_the_banners(self):
        listed = re.findall(r"^    (\d+\. \w[\w ]*?)  ", has.__doc__, re.M)
        self.assertEqual(listed, [title for title, _, _ in parts_of_has()])

    def test_a_part_uses_only_the_parts_above_it(self):
        tree, parts = ast.parse(self.read("has.py")), parts_of_has()

        def part(line):
            return sum(start <= line for _, start, _ in parts)
        defined = {}
        for node in tree.body:
            names = [node.name] if hasattr(node, "name") else [
                name.id for target in getattr(node, "targets", [])
                for name in getattr(target, "elts", [target])
                if isinstance(name, ast.Name)]
            defined.update({name: part(node.lineno) for name in names})
        wrong = [f"line {node.lineno}: {node.id}" for node in ast.walk(tree)
                 if isinstance(node, ast.Name)
                 and defined.get(node.id, 0) > part(node.lineno)]
        self.assertEqual(wrong, [])

    def test_no_class_and_no_function_is_too_large(self):
        wrong = []
        for node in ast.walk(ast.parse(self.read("has.py"))):
            lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, ast.FunctionDef) and lines > 50:
                wrong.append(f"{node.name}: {lines} lines")
            if isinstance(node, ast.ClassDef):
                own = {it.attr for it in ast.walk(node) if isinstance(it, ast.Attribute)
                       and isinstance(it.ctx, ast.Store) and isinstance(it.value, ast.Name)
                       and it.value.id == "self"}
                if lines > 350 or len(own) > 20:
                    wrong.append(f"{node.name}: {lines} lines, {len(own)} attributes")
        self.assertEqual(wrong, [])

    def test_a_class_uses_only_the_classes_above_it(self):
        classes = [node for node in ast.parse(self.read("has.py")).body
                   if isinstance(node, ast.ClassDef)]
        begins = {node.name: node.lineno for node in classes}
        wrong = [f"{each.name}: {node.id}" for each in classes for node in ast.walk(each)
                 if isinstance(node, ast.Name) and begins.get(node.id, 0) > each.lineno]
        self.assertEqual(wrong, [])

    def test_session_and_hub_use_of_each_other_what_is_listed(self):
        tree, parts = ast.parse(self.read("has.py")), parts_of_has()
        used = {name: set() for name in ("hub", "session", "heartbeat")}
        for names, line in self.chains(tree):
            part = sum(start <= line for _, start, _ in parts)
            if part == 6 and "hub" in names[:-1]:
                used["hub"].add(names[names.index("hub") + 1:][:2])
            elif part == 7 and "hub" in names[:-1]:
                used["heartbeat"].add(names[names.index("hub") + 1])
            elif part > 7 and names[0] in ("session", "other"):
                used["session"].add(names[1:3])
            self.assertFalse(part == 7 and names[0] == "session", f"line {line}: a Session")
        used["session"] |= {(node.args[0].value,) for node in ast.walk(tree)
                            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                            and node.func.attr == "each"}
        for listed, kind in ((has.FOR_SESSIONS, "hub"), (has.OF_SESSIONS, "session")):
            found = {names[0] if names[0] in listed else ".".join(names) for names in used[kind]}
            self.assertEqual(found, listed)
        self.assertEqual({name for name in vars(has.Hub) if name.startswith("on_")} | {"heard"},
                         used["heartbeat"] | {"on_stop_key"})

    def test_sessions_are_called_session_or_other_below_their_part(self):
        tree, wrong = ast.parse(self.read("has.py")), []
        for node in ast.walk(tree):
            over = ast.unparse(node.iter) if hasattr(node,
                                                     "iter") and hasattr(ast, "unparse") else ""
            if re.search(r"\bsessions\.values\(\)", over) and ast.unparse(node.target) not in (
                    "session", "other"):
                wrong.append(f"{ast.unparse(node.target)} in {over}")
        self.assertEqual(wrong, [])

    @staticmethod
    def chains(tree):
        """All `a.b.c` of a program that begin with a name: (its names, the line)."""
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                names, line = [], node.lineno
                while isinstance(node, ast.Attribute):
                    names, node = [node.attr] + names, node.value
                if isinstance(node, ast.Name):
                    yield (node.id, *names), line

    def test_no_class_is_a_thread(self):
        """Python 3.14's Thread has a `_context` of its own; the next will have other names."""
        threads = [name for name, it in vars(has).items()
                   if isinstance(it, type) and issubclass(it, threading.Thread)]
        self.assertEqual(threads, [])

    def test_no_line_is_longer_than_100_columns(self):
        self.assertEqual([f"{file}:{number}: {len(line)}" for file in ("has.py", "test_has.py")
                          for number, line in enumerate(self.read(file).split("\n"), 1)
                          if len(line) > 100], [])

    def test_families_are_named_in_part_3_and_the_settings_only(self):
        lines = self.read("has.py").split("\n")
        allowed = [range(start, end) for title, start, end in parts_of_has()
                   if title[:3] in ("1. ", "3. ")]
        begin = next(n for n, line in enumerate(lines, 1) if line.startswith(has.BEGIN_MARK))
        end = next(n for n, line in enumerate(lines, 1) if line.startswith(has.END_MARK))
        names = [f for f in has.FAMILIES if f != "plain"]
        tree, wrong = ast.parse(self.read("has.py")), []
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(
                node.value, (str, bytes)) else (
                node.id if isinstance(node, ast.Name) else "")
            text = text.decode("latin-1") if isinstance(text, bytes) else text
            if text.lower() in names and not begin < node.lineno < end and not any(
                    node.lineno in lines_ for lines_ in allowed):
                wrong.append(f"line {node.lineno}: {text}")
        self.assertEqual(wrong, [])

    def shipped(self):
        """has.conf's commented-out settings: {key: default}."""
        return dict(re.findall(r"^#(\w+) =[ ]?(.*)$", self.read("has.conf"), re.M))

    def test_has_conf_has_every_key_with_its_default(self):
        constants = {key: text for key, (text, _) in has.read_constants(HAS)[0].items()}
        shipped = self.shipped()
        self.assertEqual(list(shipped), list(constants))
        edited = [key for key in shipped if shipped[key] != constants[key]]
        if edited and not os.environ.get("CI"):
            self.skipTest(f"constants were edited: {', '.join(edited)}")
        self.assertEqual(edited, [])

    def test_has_conf_begins_with_what_everybody_needs(self):
        first, rest = self.read("has.conf").split("# ====  That is all that most people need.")
        keys = re.findall(r"(?m)^#(\w+) =", first)
        self.assertEqual(len(keys), 12)
        self.assertEqual(set(keys[:4]), {"mush_address", "hb_user", "hb_pass", "local_port"})
        texts = rest.partition("# ---- what users are told")[2]
        self.assertEqual([key for key in re.findall(r"(?m)^#(\w+) =", rest)
                          if key.endswith("_notice") and f"#{key} =" not in texts], [])

    def test_has_conf_uncommented_is_right(self):
        with tempfile.TemporaryDirectory() as folder:
            conf = os.path.join(folder, "has.conf")
            write_text(conf, re.sub(r"^#(\w+ =)", r"\1", self.read("has.conf"), flags=re.M))
            self.assertEqual(set(has.load_settings(HAS, conf)[0].texts), set(has.SETTINGS))

    def readme(self):
        """README.md, and its prose without the blocks of code."""
        text = self.read("README.md")
        return text, re.sub(r"(?m)^ {4,}.*$", "", text)

    def help(self):
        return subprocess.run([sys.executable, HAS, "--help"], stdout=subprocess.PIPE,
                              universal_newlines=True, check=True).stdout

    def test_the_readme_is_short(self):
        self.assertLessEqual(len(self.readme()[0].encode()), 20000)

    def test_the_contents_of_the_readme_are_its_headings(self):
        _, prose = self.readme()
        headings = [title for title in re.findall(r"(?m)^## (.*)$", prose) if title != "Contents"]
        listed = re.findall(r"(?m)^- \[(.*)\]\(#(.*)\)$", prose)
        self.assertEqual([title for title, _ in listed], headings)

        def anchor(title):
            return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        self.assertEqual([target for _, target in listed], [anchor(title) for title in headings])
        links = set(re.findall(r"\]\(#(.*?)\)", prose))
        self.assertLessEqual(links,
                             {anchor(title) for title in re.findall(r"(?m)^#+ (.*)$", prose)})

    def test_the_readme_names_settings_that_exist_only(self):
        text, prose = self.readme()
        # of the servers: their settings, which look like ours
        others = set("cmd_remotehost connect_fail_limit forbid_site register_site suspect_site "
                     "ip_addr ip_address "
                     "max_sitecons sconnect_cmd sconnect_host sconnect_reip socket_file".split())
        named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)[ `]", prose))
        blocks = "".join(re.findall(r"(?m)^ {4,}(\w+ = .*\n)", text))
        set_there = set(re.findall(r"(?m)^([a-z]+_[a-z_]+) = ", blocks))
        self.assertIn("dead_after", named)
        self.assertIn("mush_address", set_there)
        self.assertEqual((named | set_there) - others - set(has.SETTINGS), set())

    def test_the_readme_names_options_that_exist_and_every_one(self):
        ours = re.findall(r"--[a-z]+", self.help())
        text, _ = self.readme()
        self.assertIn("--check", ours)
        self.assertEqual([it for it in ours if it not in text and it != "--help"], [])
        known = {"": ours, "test_": re.findall(r"--[a-z]+", tool_parser().format_help())}
        commands = re.findall(r"\b(test_|)has\.py((?: +[^\s`#]+)+)", text)
        self.assertIn(("test_", " --demo"), commands)
        wrong = [option for program, arguments in commands for option in arguments.split()
                 if option.startswith("--") and option not in known[program]]
        self.assertEqual(wrong + [it for it in re.findall(r"`(--[a-z]+)", text) if it not in ours],
                         [])

    def test_the_help_fits_on_a_screen_and_knows_every_argument(self):
        lines = has.HELP.splitlines()
        self.assertLessEqual(len(lines), 24)
        self.assertEqual([line for line in lines if len(line) > 80], [])
        self.assertEqual(self.help(), has.HELP)
        known = {option for action in has.new_parser()._actions for option in action.option_strings}
        self.assertEqual(known - {"-h", "--script", "--vault", "--link", "--keep", "--front",
                                  "--resume", "--rehearse"}, set(re.findall(r"--[a-z]+", has.HELP)))

    def test_the_readme_names_every_signal(self):
        told = self.help().partition("signals:")[2].partition("exit status:")[0]
        signals = set(re.findall(r"[A-Z][A-Z0-9]{2,}", told)) - {"HAS"}
        self.assertEqual(signals, {"HUP", "USR1", "USR2", "TERM", "INT"})
        text, _ = self.readme()
        self.assertEqual([it for it in signals if not re.search(rf"\b{it}\b", text)], [])

    def test_the_readme_has_the_test_command_that_ci_runs(self):
        ci = self.read(".ci/run")
        command_line = re.search(r'"\$python" (test_has\.py.*?) 2>', ci).group(1)
        self.assertRegex(self.readme()[0], r"(?m)^    python3 %s +#" % re.escape(command_line))

    def test_the_test_classes_in_the_readme_exist(self):
        named = re.findall(r"`([A-Z][A-Za-z]+)`",
                           self.readme()[0].partition("## Working on HAS")[2])
        self.assertIn("StateTable", named)
        known = {**vars(has), **globals()}
        self.assertEqual([name for name in named if
                          not isinstance(known.get(name), (type, dict, tuple))], [])

    def test_the_log_lines_in_the_readme_are_those_of_has(self):
        rows = re.search(r"(?ms)^## Log lines that need more$(.*?)^## ", self.readme()[0]).group(1)
        quoted = [it for row in re.findall(r"(?m)^\| (`.*?) \|", rows)
                  for it in re.findall(r"`(.*?)`", row)]
        strings = "\n".join(node.value for node in ast.walk(ast.parse(self.read("has.py")))
                            if isinstance(node, ast.Constant) and isinstance(node.value, str))
        strings = re.sub(r"%[sdg]", "...", strings)
        self.assertGreater(len(quoted), 10)
        wrong = [line for line in quoted for piece in re.split(r"\.\.\.|[:;] ", line)
                 if piece.strip() not in strings]
        self.assertEqual(wrong, [])

    def test_the_top_level_is_what_it_should_be(self):
        listed = subprocess.run(["git", "ls-files"], cwd=HERE, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, universal_newlines=True).stdout.split()
        if not listed:
            self.skipTest("not a git checkout")
        self.assertEqual(sorted(name for name in listed if not name.startswith(".")),
                         ["LICENSE", "README.md", "has.conf", "has.py", "test_has.py"])


# ======================================================================
# The heartbeat alone
#
# Its thread in this process, in front of a scripted world (Tools); a Witness in place of the hub.
# ======================================================================

def restart(world, *clients):
    """The world dies and comes back; clients are told."""
    world.kill()
    for client in clients:
        client.expect(re.escape(OFFLINE))
    world.start()
    for client in clients:
        client.expect(re.escape(ONLINE))


class Case(unittest.TestCase):
    """A test with scripted worlds and a HAS in front of them."""

    def world(self, family="tinymux", **quirks):
        world = WORLDS[family](**quirks)
        world.start()
        self.addCleanup(world.stop)
        return world

    def client(self, has, line=None, world=None, name=None, **more):
        client = closed_after(self, has.client(**more))
        if line:
            client.send(line + "\r\n")
            world.wait(lambda w: w.online(name), what=f"{name} is in")
            client.barrier()
            client.text = b""
        return client


class Witness:
    """Stands for the hub and its mailbox: what a heartbeat tells is kept, and can be waited for."""

    def __init__(self):
        self.told, self._change = [], threading.Condition()

    def __getattr__(self, name):
        return name                                     # a method of the hub, for post()

    def post(self, call, *arguments):
        if call == "heard":
            call, *arguments = arguments        # what of
        with self._change:
            self.told.append((call, *arguments))
            self._change.notify_all()

    def wait(self, call, count=1, such=lambda *arguments: True):
        """Wait until this was told `count` times; return what came with it, a tuple each time."""
        def heard():
            return [arguments for arguments in self._of(call) if such(*arguments)]
        with self._change:
            if not self._change.wait_for(lambda: len(heard()) >= count, 10):
                raise AssertionError(f"{len(heard())} of {count} times {call}: {self.told}")
            return heard()

    def _of(self, call):
        return [arguments for name, *arguments in self.told if name == call]


# ---- Its rooms by hand: the clock stands still but while they wait, and a function is the world

class StillContext(has.Context):
    """A Context whose world answers at once what it is asked, or time passes.

    `world` is called with what HAS has sent, and returns bytes, or None to hang up. `later` holds
    (time, bytes or None) that come by themselves.
    """

    def __init__(self, world=lambda sent: b"", **settings):
        super().__init__(Witness(), Witness(), settings_of(tuple(settings.items())),
                         clock=lambda: self.now)
        self.now, self.world, self.later, self.sent = 1000.0, world, [], b""
        self.ours, self.theirs = socket.socketpair()
        for sock in (self.ours, self.theirs):
            sock.setblocking(False)
        self.told = self._hub_mailbox.told

    def talk(self, secret="sesame"):
        self.reader = has.Talk(self.ours, self, secret)
        return self.reader

    def connection(self, dialect="plain", **facts):
        found = has.Connection(self.talk(), HOME, None, self.settings)
        found.note(dialect=DIALECTS[dialect], life="life 1", **facts)
        found.quota = has.Quota(DIALECTS[dialect].quota, self.clock)
        return found

    def watch(self, sock, reader, events=has.READ):
        """Nothing is waited for."""

    def give(self, data):
        if data is None:
            self.theirs.close()
        elif data:
            self.theirs.sendall(data)
        self.reader.receive()

    def wait(self, until):
        try:
            sent = self.theirs.recv(65536)
        except BlockingIOError:
            sent = b""
        self.sent += sent
        due = [it for it in self.later if it[0] <= until]
        if sent:
            self.give(self.world(sent))
        elif due:
            self.later.remove(due[0])
            self.now = due[0][0]
            self.give(due[0][1])
        else:
            self.now = max(self.now, until)


class StillCase(unittest.TestCase):
    """Nonces are known: see nonce(); those of probes are NONCE."""

    NONCE = b"=0123abcd="

    def setUp(self):
        patched(self, mock.patch("has.secrets.token_hex", lambda size: "0123abcd"))

    def context(self, world=lambda sent: b"", **settings):
        made = StillContext(world, **settings)
        for sock in (made.ours, made.theirs, made.mailbox.reader, made.mailbox.writer):
            self.addCleanup(sock.close)
        self.addCleanup(made._selector.close)
        return made

    def lost(self, call, *arguments):
        """The Lost that comes of a call."""
        with self.assertRaises(has.Lost) as caught:
            call(*arguments)
        return caught.exception


class TestTalk(StillCase):
    def test_expected_text_is_taken_with_all_before_it(self):
        context = self.context(lambda sent: b"one two three")
        talk = context.talk()
        self.assertTrue(talk.ask(b"count\r\n", re.compile(rb"two"), 5))
        self.assertEqual((context.sent, talk.text, context.now), (b"count\r\n", b" three", 1000.0))
        self.assertIsNone(talk.expect(re.compile(rb"four"), 5))
        self.assertEqual((talk.text, context.now), (b" three", 1005.0))

    def test_telnet_commands_are_kept_apart(self):
        context = self.context()
        talk = context.talk()
        context.later = [(1001, b"a\xff\xfb"), (1002, b"\x46b"), (1003, b"\xff\xfd\x18" * 99)]
        self.assertTrue(talk.expect_command(re.compile(b"\xfb\x46"), 5))
        self.assertEqual((talk.text, context.now), (b"ab", 1002))
        self.assertIsNone(talk.expect_command(re.compile(b"\xfb\x01"), 5))
        self.assertLessEqual(len(talk.commands), has.MOST_COMMANDS + 1)

    def test_the_end_is_told_with_the_last_words(self):
        mark = b"=0123456789=\r\n"
        for words, shown in ((b"Go away!\r\n", '; its last words: "Go away!"'), (b"", ""),
                             (b"1\r\n2\r\nA\r\nB\r\nC\r\n" + mark + b"D\r\n",
                              '; its last words: "B C D"'),
                             (b"the password is sesame\r\n", "")):
            context = self.context()
            context.later = [(1001, words), (1002, None)]
            lost = self.lost(context.talk().expect, re.compile(b"never"), 5)
            self.assertEqual(str(lost), "closed by the world" + shown)
            self.assertEqual((lost.accepted, lost.alive, lost.ours), (True, True, False))
        context = self.context(lambda sent: None)
        context.later = [(1001, b"Said before\r\n")]
        talk = context.talk()
        self.assertIsNone(talk.expect(re.compile(b"never"), 2))
        lost = self.lost(talk.ask, b"x\r\n", re.compile(b"never"), 2)
        self.assertEqual(str(lost), "closed by the world")

    def test_what_cannot_be_sent_is_an_end_too(self):
        context = self.context()
        talk = context.talk()
        context.theirs.close()
        self.assertRegex(str(self.lost(talk.send, b"x\r\n")), "^cannot send: ")
        self.assertRegex(str(self.lost(talk.send, b"x\r\n")), "^cannot send: ")
        talk.close()
        self.assertEqual(talk.sock.fileno(), -1)

    def test_half_a_record_of_tls_is_no_end(self):
        came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(*certificate_of_all())
        world, context = server.wrap_bio(came, goes, server_side=True), self.context()
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        context.ours = client.wrap_socket(context.ours, do_handshake_on_connect=False)
        talk, done = context.talk(), [False, False]
        while not all(done):
            for number, side in enumerate((talk.sock, world)):
                with contextlib.suppress(ssl.SSLWantReadError):
                    done[number] = side.do_handshake() is None
                context.theirs.sendall(goes.read())
                with contextlib.suppress(BlockingIOError):
                    came.write(context.theirs.recv(1 << 16))
        world.write(b"Welcome\r\n")
        record = goes.read()
        for piece in record[:9], record[9:]:
            context.theirs.sendall(piece)
            talk.receive()
            self.assertIsNone(talk.ended)
        self.assertEqual(talk.text, b"Welcome\r\n")

    def test_a_greeting_is_over_after_a_pause(self):
        for later, heard, ends in (([(1000.5, b"Wel"), (1000.6, b"come")], True, 1000.85),
                                   ([], False, 1003), ([(1002.9, b"Hm")], True, 1003),
                                   ([(1001, b"\xff\xfb\x46")], False, 1001.25)):
            context = self.context()
            talk, context.later = context.talk(), later
            talk.hear_greeting()
            self.assertEqual((talk.greeted, round(context.now, 2)), (heard, ends))


class TestQuota(unittest.TestCase):
    def test_commands_come_back_one_a_second(self):
        now = [50.0]
        quota = has.Quota(100, lambda: now[0])
        for _ in range(30):
            quota.spend()
        self.assertEqual(quota.spare(), 70)
        now[0] += 10
        self.assertEqual(quota.spare(), 80)
        now[0] += 1000
        self.assertEqual(quota.spare(), 100)
        self.assertEqual(has.Quota(100, lambda: now[0], 7).spare(), 7)
        self.assertGreater(has.Quota(None, lambda: now[0]).spare(), 1000)


class TestConnection(StillCase):
    """What is asked of a world, and understood of its answers."""

    OFFERS = b"".join((command(WILL, 3), command(DO, NAWS), command(DO, TTYPE), command(WILL, 70)))
    UPTIME = b"\xff\xfa\x46\x01UPTIME\x02123\xff\xf0"

    @staticmethod
    def info(version):
        return (b"### Begin INFO 1\r\nName: X\r\nUptime: today\r\nVersion: " + version
                + b"\r\n### End INFO\r\n")

    def identified(self, context, known=None, try_address=True, was_deaf=False):
        found = has.Connection(context.talk(), HOME, None, context.settings)
        found.identify(known and DIALECTS[known], try_address, was_deaf)
        return found.world

    def test_families_and_lives(self):
        def teeny(sent):
            return self.UPTIME if sent == command(DO, 70) else b""
        context = self.context(teeny)
        context.later = [(1000, self.OFFERS)]
        with self.assertLogs(has.log, "INFO") as logged:
            world = self.identified(context)
        self.assertEqual((world.dialect.name, world.life, world.telnet, world.told),
                         ("teenymush", "127.0.0.1:4001 since 123", True, True))
        self.assertIn("recognised by what it sends at connect", logged.output[0])
        for version, name in ((b"PennMUSH 1.8", "pennmush"), (b"TinyMUSH 4.0", "tinymush"),
                              (b"MUX 2.13", "tinymux"), (b"Rhost 4", "rhostmush")):
            with self.assertLogs(has.log, "INFO") as logged:
                world = self.identified(self.context(
                    lambda sent: self.info(version) * sent.count(b"INFO")))
            self.assertEqual((world.dialect.name, world.life), (name, "127.0.0.1:4001 since today"))
            self.assertIn("by its answer to INFO", logged.output[0])

    def test_a_world_that_is_not_recognised(self):
        context = self.context(lambda sent: b"Huh?\r\n")
        context.later = [(1001, b"Welcome\r\n")]
        with self.assertLogs(has.log, "WARNING"):
            world = self.identified(context)
        self.assertEqual((world.dialect, world.life), (has.PLAIN, "?0123abcd"))
        with self.assertLogs(has.log, "WARNING"):       # silent at connect, and yet it answers
            self.assertEqual(self.identified(self.context(lambda sent: b"Huh?\r\n")).dialect,
                             has.PLAIN)
        context = self.context()
        self.assertIn("does not answer", str(self.lost(self.identified, context)))
        self.assertEqual(context.now, 1000 + has.GREETING_SECONDS + has.INFO_SECONDS)
        self.assertIn("closed", str(self.lost(self.identified, self.context(lambda sent: None))))
        context = self.context()
        context.later = [(1001, b"Not from there.\r\n"), (1001.1, None)]
        self.assertIn("Not from there.", str(self.lost(self.identified, context)))

    def test_a_teenymush_without_mssp_has_no_start_id(self):
        for answer, telnet in ((b"\xff\xfc\x56", True), (b"Huh?\r\n", False)):
            context = self.context(lambda sent: answer)
            world = self.identified(context, "teenymush")
            self.assertEqual((world.life, world.telnet), ("?0123abcd", telnet))
            self.assertEqual(context.sent, b"\xff\xfd\x56\r\n")

    def test_a_world_that_knew_no_telnet_in_its_last_life_is_not_waited_for_long(self):
        context = self.context(lambda sent: b"Huh?\r\n")
        self.assertFalse(self.identified(context, "teenymush", was_deaf=True).telnet)
        self.assertAlmostEqual(context.now, 1000 + 2 * has.DEAF_SECONDS)

    def test_whether_addresses_can_be_told(self):
        """RhostMUSH: a line taken in silence was understood, and so is one before its greeting."""
        info = self.info(b"Rhost 4")
        for greeting, before, told in ((b"Hi\r\n", b"", True), (b"Hi\r\n", b"Hi\r\n", False),
                                       (b"", b"Hi\r\n", True)):
            context = self.context(lambda sent: (greeting + info + before) * (b"PROXY" in sent)
                                   + info, mush_type="rhostmush")
            with self.assertLogs(has.log, "WARNING") as logged:
                has.log.warning("the log")
                self.assertEqual(self.identified(context, "rhostmush").told, told)
            self.assertEqual(len(logged.output), 1 if told else 2)
            self.assertIn(b"PROXY TCP4 127.0.0.1 ", context.sent)
            self.assertEqual(context.now, 1000)         # users wait for it
        context = self.context(lambda sent: None)
        self.assertTrue(self.lost(self.identified, context, "rhostmush").at_address)
        lost = self.lost(self.identified, self.context(), "rhostmush")
        self.assertIn("does not answer", str(lost))
        context = self.context(lambda sent: self.info(b"Rhost 4"))
        self.assertFalse(self.identified(context, "rhostmush", False).told)
        self.assertNotIn(b"PROXY", context.sent)
        context = self.context(lambda sent: self.info(b"Rhost 4"), remotehostname_cmd="none")
        self.assertTrue(self.identified(context, "rhostmush").told)
        self.assertNotIn(b"PROXY", context.sent)

    @staticmethod
    def game(family, right=True):
        """A world of that family that takes a login, or refuses it, and answers probes."""
        def world(sent):
            if b"connect" in sent:
                return answer(family, right, 0, END[family])
            if sent == b"\xff\xfd\x56":
                return b"\xff\xfc\x56"
            return sent[6:] if sent.startswith(b"think ") else b""
        return world

    def test_logins_by_family(self):
        for family in FAMILIES:
            for right in (True, False):
                connection = self.context(self.game(family, right)).connection(family)
                self.assertEqual(connection.log_in(GOOD), right, family)
                self.assertEqual(connection.world.shut, not right, family)

    def test_a_teenymush_that_leaves_the_question_unanswered_is_in_all_the_same(self):
        game = self.game("teenymush")
        context = self.context(lambda sent: b"" if sent == b"\xff\xfd\x56" else game(sent))
        self.assertTrue(context.connection("teenymush").log_in(GOOD))
        self.assertEqual(context.now, 1000 + has.END_SECONDS)

    def test_logins_that_lead_nowhere(self):
        connection = self.context(lambda sent: None).connection("tinymux")
        self.assertFalse(connection.log_in(GOOD))
        self.assertEqual(connection.talk.ended, "closed by the world")
        context = self.context(mush_type="tinymux", hb_timeout=4)
        lost = self.lost(context.connection("tinymux").log_in, GOOD)
        self.assertIn("does not answer to the heartbeat's login", str(lost))
        self.assertEqual(context.now, 1004 + has.ASIDE_SECONDS)     # it was asked for its family
        context = self.context(
            lambda sent: self.info(b"PennMUSH 1") if sent == b"INFO\r\n" else b"",
            mush_type="teenymush")
        lost = self.lost(context.connection("teenymush").log_in, GOOD)
        self.assertIn("it looks like a pennmush: is mush_type right?", str(lost))
        game = self.game("tinymux")
        context = self.context(lambda sent: b"" if sent.startswith(b"think") else game(sent))
        lost = self.lost(context.connection("tinymux").log_in, GOOD)
        self.assertIn("is logged in but gets no answer", str(lost))

    def test_rights(self):
        for family, said, checks, rights, warning in (
                ("pennmush", b"1", True, True, None),
                ("pennmush", b"0", False, False, "may not check passwords: set its WIZARD flag"),
                ("rhostmush", b"#-1 PERMISSION DENIED", False, False, "ROYALTY or IMMORTAL"),
                ("tinymux", b"1", False, True, None), ("tinymux", b"Huh?", False, True, None),
                ("tinymux", b"0", False, False, "has no WIZARD flag: it cannot get back in"),
                ("plain", b"", False, True, None)):
            context = self.context(
                lambda sent: b"%s %s %s\r\n" % (self.NONCE, said, self.NONCE))
            connection = context.connection(family)
            with self.assertLogs(has.log, "WARNING") as logged:
                has.log.warning("the log")
                connection.look_at_rights(GOOD)
            world = connection.world
            self.assertEqual((world.checks, world.rights), (checks, rights), (family, said))
            self.assertEqual(len(logged.output), 2 if warning else 1)
            self.assertIn(warning or "the log", logged.output[-1])
            self.assertEqual(connection.lacks_something, not rights or family == "plain")

    def test_questions(self):
        for family, blind, answer_, seconds in (
                ("tinymux", False, self.NONCE + b"\r\n", 0), ("tinymux", True, INFO, 0),
                ("pennmush", True, self.NONCE + b"\r\n", 0), ("plain", False, b"", 1),
                ("tinymux", False, b"x" + self.NONCE + b"\r\n", None),
                ("tinymux", True, b"", None)):
            context = self.context(lambda sent: answer_)
            connection = context.connection(family, blind=blind)
            self.assertEqual(connection.question(5), seconds is not None)
            self.assertEqual(context.now - 1000, 5 if seconds is None else seconds)
        context = self.context()
        context.later = [(1000.5, None)]
        self.lost(context.connection("plain").question, 5)

    def test_the_login_screen_is_watched_where_no_login_is_taken(self):
        context = self.context(lambda sent: INFO)
        connection = context.connection("tinymux")
        connection.stay_outside()
        self.assertEqual((connection.world.blind, connection.renew_at), (True, 1060))
        self.lost(self.context().connection("tinymux").stay_outside)

    def test_verdicts(self):
        for said, verdicts in ((b"1:0", [True, False]), (b"1", [None, None]), (None, [None, None]),
                               (b"1:#-1 PERMISSION DENIED", [True, None])):
            context = self.context(
                lambda sent: said and b"%s %s %s\r\n" % (self.NONCE, said, self.NONCE) or b"")
            connection = context.connection("pennmush", checks=True)
            self.assertEqual(connection.verdicts([GOOD, BAD]), verdicts)
            self.assertEqual(connection.quota.spare(), 99 + (said is None))     # two seconds later
        long = has.Credentials(b"connect", b"Alice", b"x" * 4000)
        self.assertEqual(connection.verdicts([long]), [None])
        self.assertEqual([connection.can_ask(it) for it in ([GOOD], [long], [GOOD] * 20)],
                         [True, False, True])
        connection.note(checks=False)
        self.assertFalse(connection.can_ask([GOOD]))

    def test_it_is_left_to_a_new_process_and_by_an_old_one(self):
        target = (socket.AF_INET, ("127.0.0.1", 4001))
        context = self.context()
        connection = context.connection("tinymux", target=target, blind=True, shut=True,
                                        looks="plain")
        connection.quota.spend()
        connection.talk.text, connection.renew_at = b"half a l", 1060.0
        connection.talk.scanner.feed(b"\xff\xfd")
        left = json.loads(json.dumps(connection.park()))
        left["fd"] = os.dup(context.theirs.fileno())
        other = has.Connection.unpark(left, context)
        self.addCleanup(other.talk.sock.close)
        self.assertEqual(other.world, connection.world)
        talk = other.talk
        self.assertEqual((talk.text, other.renew_at, other.quota.spare(), talk.scanner.held),
                         (b"half a l", 1060.0, 99, b"\xff\xfd"))
        left["values"]["refused"] = left["values"].pop("shut")     # so older programs called it
        for gone in ("looks", "word"):                             # ... and did not know these
            del left["values"][gone]
        left["fd"] = os.dup(context.theirs.fileno())
        older = has.Connection.unpark(left, context)
        self.addCleanup(older.talk.sock.close)
        world = older.world
        self.assertEqual((world.shut, world.looks, world.word), (True, None, "auto"))
        for broken in ({**left, "dialect": "mud"}, {**left, "values": {}}):
            with self.assertRaises(KeyError):
                has.Connection.unpark({**broken, "fd": os.dup(context.theirs.fileno())}, context)


class TestReaching(StillCase):
    """AddressBook and Connector: names, connects, whose fault it is."""

    NAME, PLACE = has.Address("mush.example", 4201, None), (socket.AF_INET, ("192.0.2.1", 4201))

    def book(self):
        self.now, self.posted = 0.0, []
        return has.AddressBook(lambda call, *more: self.posted.append((call, more)),
                               lambda: self.now)

    def test_a_name_that_led_to_its_world_is_looked_up_when_it_leads_nowhere_for_long(self):
        book = self.book()
        other = (socket.AF_INET, ("192.0.2.9", 4201))
        with mock.patch.object(book, "look_up", return_value=[other]) as look_up:
            self.assertEqual(book.targets(self.NAME), [other])
            book.leads(self.NAME, self.PLACE)
            self.now += 99
            self.assertEqual(book.targets(self.NAME), [self.PLACE])
            book.leads_nowhere(self.NAME)
            self.now += has.LOOK_UP_SECONDS - 1
            book.leads_nowhere(self.NAME)
            self.assertEqual((book.targets(self.NAME), look_up.call_count), ([self.PLACE], 1))
            self.now += 1
            self.assertEqual((book.targets(self.NAME), look_up.call_count), ([other], 2))
            look_up.side_effect = socket.gaierror(-3, "Temporary failure")
            self.now += has.LOOK_UP_SECONDS
            self.assertEqual((book.targets(self.NAME), look_up.call_count), ([self.PLACE], 3))
            book.forget_all_but(None)
            with self.assertRaises(socket.gaierror):
                book.targets(self.NAME)

    def test_other_names_are_looked_up_beside(self):
        book, unix = self.book(), has.Address(None, 0, "/tmp/mush.sock")
        for address in (HOME, unix, has.Address("::1", 5, None)):
            self.assertTrue(book.is_at_hand(address))
        self.assertEqual(book.targets(unix), [(socket.AF_UNIX, "/tmp/mush.sock")])
        for found in ([self.PLACE], UnicodeError("label too long")):
            with mock.patch.object(has.threading, "Thread") as thread:
                self.assertFalse(book.is_at_hand(self.NAME))
                self.assertFalse(book.is_at_hand(self.NAME))        # one thread is enough
            (_, made), = thread.call_args_list
            with mock.patch.object(book, "look_up", side_effect=[found]):
                made["target"](*made["args"])
            (call, more), = self.posted
            call(*more)
            self.posted.clear()
            self.assertTrue(book.is_at_hand(self.NAME))
            if isinstance(found, list):
                self.assertEqual(book.targets(self.NAME), found)
            else:
                with self.assertRaises(UnicodeError):
                    book.targets(self.NAME)

    def context(self, **settings):
        """A Context that really waits, by a clock of ours."""
        self.now = 1000.0
        made = has.Context(Witness(), Witness(), settings_of(tuple(settings.items())),
                           clock=lambda: self.now)
        for it in (made.mailbox.reader, made.mailbox.writer, made._selector):
            self.addCleanup(it.close)
        return made

    def opened(self, context, target):
        book = has.AddressBook(None, context.clock)
        with mock.patch.object(book, "look_up", return_value=[target]):
            connection = has.Connector(context, book).open(HOME)
        self.addCleanup(connection.close)
        return connection

    def test_how_far_away_the_world_is(self):
        """That is for kernels to say: the world may be busy with something else."""
        context = self.context()
        wait = context.wait

        def slow(until):
            self.now += 0.04
            wait(until)
        with socket.socket() as listener, mock.patch.object(context, "wait", slow):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            book = has.AddressBook(None, context.clock)
            connector = has.Connector(context, book)
            with mock.patch.object(book, "look_up", return_value=[
                    (socket.AF_INET, listener.getsockname())]):
                connection = connector.open(HOME)
            self.addCleanup(connection.close)
        self.assertAlmostEqual(connector.round_trip, 0.04)

    def test_connects(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            target = (socket.AF_INET, listener.getsockname())
            found = self.opened(self.context(), target)
            self.assertEqual((found.world.target, found.talk.ended), (target, None))
            lost = self.lost(self.opened, self.context(local_port=target[1][1]), target)
            self.assertIn("that is HAS itself", str(lost))
            self.assertEqual((lost.ours, lost.refused), (True, False))
            with mock.patch.object(has, "is_connected_to_itself", return_value=True):
                lost = self.lost(self.opened, self.context(), target)
            self.assertIn("connected to itself", str(lost))
            self.assertEqual((lost.ours, lost.refused), (False, True))
        lost = self.lost(self.opened, self.context(), target)
        self.assertEqual((lost.ours, lost.refused, lost.accepted), (False, True, False))
        gone = (socket.AF_UNIX, "/nonexistent/mush.sock")
        self.assertTrue(self.lost(self.opened, self.context(), gone).refused)

    def test_only_what_connects_say_of_the_world_counts(self):
        for number, ours in ((errno.ECONNREFUSED, False), (errno.ETIMEDOUT, False),
                             (errno.EHOSTUNREACH, False), (errno.ENETUNREACH, True),
                             (errno.EACCES, True), (errno.EADDRNOTAVAIL, True),
                             (errno.EMFILE, True), (errno.ENOMEM, True), (errno.ENOBUFS, True)):
            with mock.patch.object(has, "begin_connect", side_effect=OSError(number, "x")):
                lost = self.lost(self.opened, self.context(), self.PLACE)
            self.assertEqual(lost.ours, ours, errno.errorcode[number])
        for error in (socket.gaierror(2, "not known"), UnicodeError("label too long")):
            with mock.patch.object(has.AddressBook, "targets", side_effect=error):
                lost = self.lost(self.opened, self.context(), self.PLACE)
            self.assertEqual((lost.ours, lost.refused), (True, False))

    def deaf(self):
        """A socket that cannot be written to."""
        ours, theirs = socket.socketpair()
        self.addCleanup(theirs.close)
        ours.setblocking(False)
        with self.assertRaises(BlockingIOError):
            while True:
                ours.send(b"x" * 65536)
        return ours

    def test_a_connect_that_is_not_answered(self):
        context = self.context()
        context.mailbox.post(setattr, self, "now", 1000.0 + has.REACH_SECONDS)
        with mock.patch.object(has, "begin_connect", side_effect=lambda target: self.deaf()):
            lost = self.lost(self.opened, context, self.PLACE)
        self.assertEqual((str(lost), lost.ours, lost.refused),
                         ("no answer to the connect", False, False))

    def test_tls(self):
        """A failed handshake says nothing of the world but that it lives."""
        wrap = mock.Mock(side_effect=[ssl.SSLError("expired"), ValueError("no such name"), None])
        context = self.context()
        context.settings.world_tls = types.SimpleNamespace(wrap_socket=wrap)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            target = (socket.AF_INET, listener.getsockname())
            for why in ("TLS: .*expired", "TLS: no such name"):
                lost = self.lost(self.opened, context, target)
                self.assertRegex(str(lost), why)
                self.assertEqual((lost.ours, lost.accepted, lost.refused), (True, True, False))
            wrap.side_effect = lambda sock, server_hostname: sock
            self.assertEqual(self.opened(context, target).world.tls,
                             context.settings.recipes["world"])
        wrap.assert_called_with(mock.ANY, server_hostname=HOME.host)

    def test_a_stop_ends_a_connect(self):
        context = self.context()
        context.mailbox.post(setattr, context, "stopping", True)
        with mock.patch.object(has, "begin_connect", side_effect=lambda target: self.deaf()):
            with self.assertRaises(has.Stopped):
                self.opened(context, self.PLACE)
        self.assertEqual(len(context._selector.get_map()), 1)       # the mailbox


class TestLives(unittest.TestCase):
    def test_a_start_id_names_a_life_until_it_proves_nothing(self):
        now = [5000.0]
        lives = has.Lives(lambda: now[0])
        lives.rename()                                              # there is none yet
        self.assertEqual(lives.name("A since 1"), "A since 1")
        lives.enter("A since 1")
        lives.doubt()                                               # long ago, by its start id
        self.assertEqual(lives.name("A since 1"), "A since 1")
        lives.enter("A since 2")
        now[0] += has.START_ID_SECONDS - 0.1
        lives.enter("A since 2")
        lives.doubt()
        second = lives.name("A since 2")
        self.assertNotEqual(second, "A since 2")
        lives.enter(second)
        lives.rename()
        third = lives.name("A since 2")
        self.assertRegex(third, r"^A since 2 \(\w+\)$")             # not a name behind a name
        self.assertNotEqual(third, second)
        other = has.Lives(lambda: now[0])
        other.take_up(json.loads(json.dumps(lives.survivors())))
        self.assertEqual((other.name("A since 2"), tuple(other.life)), (third, lives.life))
        other.take_up({})                                           # from before there were names
        other.take_up({"life": ["A since 3", 4000.0], "renamed": [None, None]})     # in older words
        self.assertEqual(other.name("A since 2"), "A since 2")

    def test_the_first_life_may_have_begun_in_this_second(self):
        """HAS is started with the world, which is restarted before the second is over: nobody may
        be thrown out."""
        now = time.time()
        for told, young in (
                (str(int(now)), True), (time.ctime(now), True), (str(int(now) - 5), False),
                (time.ctime(now - 3600), False), (time.ctime(now + 3600), False), ("today", False),
                ("9" * 99, False), ("Wed Feb 31 25:00:00 2026", False)):
            lives, life = has.Lives(time.monotonic), f"127.0.0.1:4201 since {told}"
            lives.enter(life)
            lives.doubt()
            self.assertEqual(lives.name(life) != life, young, told)

    def test_the_pause_after_a_login_that_was_not_taken(self):
        now = [0.0]
        pause = has.LoginPause(lambda: now[0])
        self.assertFalse(pause.holds_in("?1"))
        for refused, seconds in ((True, has.LOGIN_AGAIN_SECONDS),
                                 (False, has.LOGIN_CLOSED_SECONDS)):
            self.assertEqual(pause.begin_in("life 1", refused), seconds)
            self.assertEqual([pause.holds_in(it) for it in ("life 1", "life 2", "?1")],
                             [True, False, True])
            other = has.LoginPause(lambda: now[0])
            other.take_up(json.loads(json.dumps(pause.survivors())))
            self.assertTrue(other.holds_in("life 1"))
            now[0] += seconds
            self.assertFalse(pause.holds_in("life 1"))
        pause.begin(5)
        pause.end()
        self.assertFalse(pause.holds_in("?1"))


class TestCourse(unittest.TestCase):
    """Which address is tried: pure."""

    A, B, C = (has.Address("192.0.2.1", port, None) for port in (1, 2, 3))

    def course(self, *addresses, **settings):
        self.now = 1000.0
        self.settings = types.SimpleNamespace(**{**dict(
            mush_address=list(addresses), failover_after=60, failback_after=0, retry=1, beat=10),
            **settings})
        return has.Course(lambda: self.now)

    def test_who_is_tried_while_users_are_on_none(self):
        course = self.course(self.A, self.B)
        self.assertEqual(course.candidates(self.settings), [self.A])
        course.arrive(self.B)
        self.assertEqual(course.candidates(self.settings), [self.B])
        course.on_down()
        self.now += 59
        course.on_down()
        self.assertEqual(course.candidates(self.settings), [self.B])
        self.now += 1
        self.assertEqual(course.candidates(self.settings), [self.B, self.A])
        self.settings.failover_after = 0
        self.assertEqual(course.candidates(self.settings), [self.B])
        course.on_settings(self.C)                                  # a HUP, without B and A
        self.settings.mush_address = [self.C]
        self.assertEqual(course.candidates(self.settings), [self.C, self.B])
        course.arrive(self.C)
        self.assertEqual((course.wanted, course.candidates(self.settings)), (None, [self.C]))

    def test_the_wish_of_a_hup(self):
        course = self.course(self.A)
        course.arrive(self.A)
        self.assertIsNone(course.other(self.settings))
        course.on_settings(self.A)                                  # where they are already
        self.assertIsNone(course.other(self.settings))
        course.on_settings(self.B)
        self.assertEqual(course.other(self.settings), self.B)
        self.assertTrue(course.begin_try(self.settings))
        self.assertFalse(course.is_to_move(True, self.settings, False))
        self.now += has.WISH_SECONDS - 0.1
        self.assertIsNone(course.other(self.settings))
        self.now += 0.1
        self.assertEqual(course.other(self.settings), self.B)
        self.assertTrue(course.is_to_move(True, self.settings, True))
        course.begin_try(self.settings)
        course.on_settings(None)                                    # a HUP has it tried at once
        self.assertEqual(course.other(self.settings), self.B)

    def test_back_to_the_preferred_one_when_it_has_answered_for_long(self):
        course = self.course(self.A, self.B, failback_after=15)
        course.arrive(self.B)
        moves = []
        for answers in (True, True, False, True, True, True):
            self.assertEqual(course.other(self.settings), self.A)
            self.assertFalse(course.begin_try(self.settings))
            self.assertIsNone(course.other(self.settings))
            moves.append(course.is_to_move(False, self.settings, answers))
            self.now += self.settings.beat
        self.assertEqual(moves, [False, False, False, False, False, True])

    def test_how_often_a_world_that_is_down_is_tried(self):
        """20 times a second in the first minute, then ever more seldom, down to `retry`; far ones
        as they answer."""
        for retry, round_trip, minutes, wanted in (
                (1, 0.0003, 0, 0.05), (1, 0.0003, 0.9, 0.05), (1, 0.0003, 2, 0.1),
                (1, 0.0003, 3, 0.2), (1, 0.0003, 9, 1), (60, 0.0003, 600, 60),
                (0.02, 0.0003, 0, 0.02), (1, 0.05, 0, 0.5), (1, 0.5, 0, 1)):
            course = has.Course(lambda: 1000.0 + 60 * minutes)
            course.down_since = 1000.0
            pace = course.pace(types.SimpleNamespace(retry=retry), round_trip)
            self.assertAlmostEqual(pace, wanted, 3)

    def test_it_survives(self):
        course = self.course(self.A, self.B)
        course.arrive(self.A)
        course.on_settings(self.B)
        course.on_down()
        other = self.course()
        other.take_up(json.loads(json.dumps(course.survivors())))
        self.assertEqual((other.current, other.wanted, other.down_since), (self.A, self.B, 1000.0))


class TestEntrance(StillCase):
    """From an address to a confirmed Connection; `worlds` are what is reached, in order."""

    def entrance(self, *worlds, family="tinymux", **settings):
        self.still = self.context(mush_type=family, hb_user="Alice", hb_pass="alicepw", **settings)
        self.opened, worlds = [], list(worlds)

        def connect(address):
            self.still.ours, self.still.theirs = socket.socketpair()
            for sock in (self.still.ours, self.still.theirs):
                sock.setblocking(False)
                self.addCleanup(sock.close)
            self.still.world = worlds.pop(0)
            made = has.Connection(self.still.talk(), address, None, self.still.settings)
            self.opened.append(made)
            return made
        self.lives = has.Lives(self.still.clock)
        return has.Entrance(self.still, types.SimpleNamespace(open=connect), self.lives)

    @staticmethod
    def game(right=True, uptime=b"today", hangs_up=False):
        def world(sent):
            if b"connect" in sent:
                return None if hangs_up else answer("tinymux", right, 0, END["tinymux"])
            if sent == b"INFO\r\n":
                return INFO.replace(b"Uptime: x", b"Uptime: " + uptime)
            if sent.startswith(b"think"):
                return b"%s 1 %s\r\n" % (nonce_, nonce_) if b"hasflag" in sent else sent[6:]
            return b""
        nonce_ = StillCase.NONCE
        return world

    def test_in(self):
        entrance = self.entrance(self.game())
        world = entrance.establish(HOME).world
        self.assertEqual((world.blind, world.shut, world.rights), (False, False, True))
        self.assertEqual(world.life, f"{HOME} since today")

    def test_a_life_that_was_renamed(self):
        entrance = self.entrance(self.game())
        self.lives.enter(f"{HOME} since today")
        self.lives.rename()
        self.assertEqual(entrance.establish(HOME).world.life, f"{HOME} since today (0123abcd)")

    def test_refused_and_then_not_tried_in_that_life(self):
        refuses = self.game(False)
        entrance = self.entrance(refuses, refuses, self.game(True, b"tomorrow"))
        with self.assertLogs(has.log, "WARNING") as logged:
            world = entrance.establish(HOME).world
        self.assertIn("refuses the heartbeat's login (hb_user = Alice)", logged.output[0])
        self.assertEqual((world.blind, world.shut), (True, True))
        self.still.sent = b""
        world = entrance.establish(HOME).world
        self.assertEqual((world.blind, world.shut), (True, True))
        self.assertNotIn(b"connect", self.still.sent)
        with self.assertLogs(has.log, "INFO") as logged:
            self.assertFalse(entrance.establish(HOME).world.blind)
        self.assertIn("the heartbeat Alice is logged in now", logged.output[0])

    def test_new_settings_while_the_login_of_the_old_ones_is_refused(self):
        refuses = self.game(False)

        def world(sent):
            if b"connect" in sent:              # the HUP comes while the answer is awaited
                self.still.settings = settings_of((("hb_pass", "another"),
                                                   ("mush_type", "tinymux")))
                entrance.on_settings(False)
            return refuses(sent)
        entrance = self.entrance(world, self.game())
        with self.assertLogs(has.log, "WARNING"):
            self.assertTrue(entrance.establish(HOME).world.blind)
        self.assertFalse(entrance.establish(HOME).world.blind)
        self.assertIn(b"another", self.still.sent)

    def test_a_world_that_hangs_up_on_the_login(self):
        """It is full or closed, if it lives on; else it died, and its next life may take it."""
        for uptime, blind in ((b"today", True), (b"tomorrow", False)):
            entrance = self.entrance(self.game(hangs_up=True), self.game(True, uptime))
            with self.assertLogs(has.log, "WARNING") as logged:
                self.assertEqual(entrance.establish(HOME).world.blind, blind)
            self.assertIn("are logins disabled, or is it full?", logged.output[0])
            self.assertEqual([it.talk.sock.fileno() < 0 for it in self.opened], [True, False])

    def test_a_world_that_hangs_up_on_the_address_line_is_not_told_it_again(self):
        def plain(sent):
            return INFO
        entrance = self.entrance(lambda sent: None, plain, plain, family="rhostmush", hb_timeout=1)
        with self.assertLogs(has.log, "WARNING") as logged:
            self.lost(entrance.establish, HOME)                     # it has no login to give
            self.assertIn("hangs up on the line that hands over addresses", logged.output[0])
            self.still.sent = b""
            self.lost(entrance.establish, HOME)
        self.assertNotIn(b"PROXY", self.still.sent)
        self.assertTrue(all(it.talk.sock.fileno() < 0 for it in self.opened))

    def test_a_world_of_another_family_than_mush_type_says(self):
        """It is named once; not taking its login is no refusal, and no login is tried for long."""
        penn = INFO.replace(b"Uptime: x", b"Uptime: x\r\nVersion: PennMUSH 1.8")
        entrance = self.entrance(*[lambda sent: penn] * 2, family="tinymux", hb_timeout=1)
        with self.assertLogs(has.log, "WARNING") as logged:
            world = entrance.establish(HOME).world
            entrance.establish(HOME)
        self.assertEqual((world.looks, world.blind, world.shut), ("pennmush", True, False))
        self.assertEqual(len(logged.output), 1)
        self.assertIn("looks like a pennmush: set mush_type = pennmush", logged.output[0])

    def test_a_world_without_logins_only_has_to_live_on(self):
        entrance = self.entrance(lambda sent: b"", lambda sent: None, family="plain")
        self.assertIs(entrance.establish(HOME).dialect, has.PLAIN)
        self.assertEqual(self.still.now, 1000 + has.WITNESS_SECONDS)

    def test_what_was_recognised_is_known_from_then_on(self):
        def info(sent):
            return game(sent).replace(b"Uptime", b"Version: MUX 2\r\nUptime")
        game = self.game()
        entrance = self.entrance(info, game, game, family="auto")
        for known in (False, True):
            self.assertEqual(entrance.establish(HOME).dialect.name, "tinymux")
            self.assertEqual(self.still.sent.count(b"INFO\r\n"), 3 - known)
            self.still.sent = b""
        other = self.entrance(game)
        other.take_up(json.loads(json.dumps(entrance.survivors())))
        self.assertEqual(other._known, {HOME: DIALECTS["tinymux"]})
        other.on_settings(other_worlds=True)
        self.assertEqual(other._known, {})


class FakeWorld:
    """A Connection as Probes, Search and Heartbeat use it; `answers` are those to its probes."""

    def __init__(self, address=HOME, answers=(), **facts):
        self.world = has.World(address, None, DIALECTS["tinymux"], "life 1", False, False, **facts)
        self.address, self.answers, self.closed, self.asked = address, list(answers), False, []
        self.talk, self.renew_at = types.SimpleNamespace(ended=None, sock=None), None
        self.lacks_something, self.quota = False, types.SimpleNamespace(spare=lambda: 100)

    def question(self, seconds):
        self.asked.append(seconds)
        answer_ = self.answers.pop(0)
        if isinstance(answer_, BaseException):
            raise answer_
        return answer_() if callable(answer_) else answer_

    def close(self):
        self.closed = True


class TestProbes(StillCase):
    def probe(self, *answers, meanwhile=lambda: None, asks=((5, 1),), before=None):
        self.still = self.context(hb_timeout=10, dead_after=25)
        self.probes = has.Probes(self.still, meanwhile)
        self.probes.asks, self.probes.silent_since = list(asks), before
        self.connection = FakeWorld(answers=[self.after(*it) for it in answers])
        self.probes.probe(self.connection)

    def after(self, seconds, answered):
        def passes():
            self.still.now += seconds
            return answered
        return passes

    def test_one_answer_serves_all_who_asked_before(self):
        self.probe((0.5, True), asks=[(5, 1), (6, 1)])
        self.assertEqual(self.still.told, [("on_answers", [(5, 1), (6, 1)], "life 1", 0.5)])
        self.assertEqual(self.probes.asks, [])

    def test_a_world_that_was_silent_for_a_while(self):
        self.probe((10, False), (3, True))
        self.assertEqual(self.still.told, [("silent",), ("answering",),
                                           ("on_answers", [(5, 1)], "life 1", 13.0)])
        self.assertIsNone(self.probes.silent_since)

    def test_silence_that_an_older_process_saw_goes_on(self):
        self.probe((1, True), before=990.0)
        self.assertEqual(self.still.told, [("answering",),
                                           ("on_answers", [(5, 1)], "life 1", 11.0)])

    def test_silent_for_too_long(self):
        with self.assertRaises(has.Lost) as caught:
            self.probe((10, False), (10, False), (5, False))
        self.assertEqual((caught.exception.dead, str(caught.exception)),
                         (True, "no answer for 25 s"))
        self.assertEqual(self.connection.asked, [10, 10, 5])
        self.assertEqual((self.probes.asks, self.probes.silent_since), ([(5, 1)], None))

    def test_who_asked_is_answered_by_the_world_they_move_to(self):
        with self.assertRaises(has.Moved):
            self.probe((10, False), meanwhile=mock.Mock(side_effect=has.Moved(None)))
        self.assertEqual((self.probes.asks, self.probes.silent_since), ([(5, 1)], None))


class TestSearch(StillCase):
    """Search by hand: `found` are the results of trying an address, in order."""

    def search(self, *found, **settings):
        self.still = self.context(mush_address=f"{HOME}, {AWAY}", **settings)
        self.course, self.lives = has.Course(self.still.clock), has.Lives(self.still.clock)
        self.tried = []
        entrance = mock.Mock()
        entrance.establish.side_effect = lambda it: self.tried.append(it) or self.next_of(found)
        found = list(found)
        self.entrance = entrance
        book = types.SimpleNamespace(is_at_hand=lambda address: self.at_hand)
        self.at_hand, rest = True, mock.Mock()
        return has.Search(self.still, self.course, entrance, book, self.lives, rest)

    @staticmethod
    def next_of(found):
        result = found.pop(0)
        if isinstance(result, BaseException):
            raise result.with_traceback(None)
        return result

    def test_what_failures_say(self):
        """Of the world, to the hub; of this machine, to the log; refusals end lives and pauses."""
        for lost, tell, level, ended, renamed in (
                (has.Lost("x", refused=True), "unreachable", None, True, True),
                (has.Lost("x"), "unreachable", None, True, False),
                (has.Lost("x", accepted=True), "unreachable", None, False, False),
                (has.Lost("x", accepted=True, alive=True), "trouble", None, False, False),
                (has.Lost("x", ours=True), "trouble", "ERROR", False, False),
                (ValueError("x"), "trouble", "ERROR", False, False)):
            search = self.search(lost, lost, FakeWorld())
            self.course.arrive(HOME)
            self.lives.enter("life 1")
            with self.assertLogs(has.log, "WARNING") as logged:
                has.log.warning("the log")
                self.assertIs(type(search.find()), FakeWorld)
            said = "x" if isinstance(lost, has.Lost) else "ValueError('x')"
            accepted = getattr(lost, "accepted", False)
            self.assertEqual(self.still.told, [(tell, HOME, said, accepted)] * 2)
            self.assertEqual(len(logged.output), 2 if level else 1)         # said once
            self.assertEqual(self.entrance.pause.end.called, ended)
            self.assertEqual(self.lives.name("life 1") != "life 1", renamed)

    def test_a_world_to_move_to(self):
        world = FakeWorld(AWAY)
        search = self.search(has.Lost("not yet"), world)
        self.course.arrive(HOME)
        search.consider_moving()
        self.assertEqual(self.tried, [])
        self.course.on_settings(AWAY)
        self.at_hand = False
        search.consider_moving()
        self.assertEqual(self.tried, [])                            # its name is not known yet
        self.at_hand = True
        with self.assertLogs(has.log, "ERROR") as logged:
            search.consider_moving()
        self.assertIn(f"{AWAY} cannot take over: not yet; users stay on {HOME}", logged.output[0])
        self.assertEqual(self.still.told, [("on_wish", f"{AWAY}: not yet")])
        self.still.now += has.WISH_SECONDS
        with self.assertRaises(has.Moved) as moved:
            search.consider_moving()
        self.assertIs(moved.exception.connection, world)

    def test_the_preferred_world_is_watched_before_users_return(self):
        worlds = [FakeWorld(HOME) for _ in range(3)]
        search = self.search(*worlds, failback_after=15, beat=10)
        self.course.arrive(AWAY)
        for _ in range(2):
            search.consider_moving()
            self.still.now += 10
        with self.assertRaises(has.Moved):
            search.consider_moving()
        self.assertEqual([it.closed for it in worlds], [True, True, False])

    def test_another_connection_to_the_same_world_must_not_be_worse(self):
        old, good = FakeWorld(), FakeWorld()
        blind, other = FakeWorld(), FakeWorld(looks="pennmush")
        blind.world = blind.world._replace(blind=True)
        search = self.search(blind, other, ValueError("planted"), good)
        self.course.arrive(HOME)
        for why in ("login is not taken any more", "it looks like a pennmush", "planted"):
            with self.assertLogs(has.log, "ERROR") as logged:
                self.assertIsNone(search.try_beside(HOME, old))
            self.assertRegex(logged.output[-1], f"HUP: the new settings do not work with .*{why}")
        self.assertTrue(blind.closed and other.closed)
        self.assertEqual(len([it for it in self.still.told if it[0] == "on_wish"]), 3)
        self.assertIs(search.try_beside(HOME, old), good)


class TestHeartbeatByHand(StillCase):
    """The thread's loop, in this thread: what it does with a connection, turn by turn."""

    def heartbeat(self, *worlds, **settings):
        """A Heartbeat that finds `worlds`, and stops when they are used up or `self.turns` is 0."""
        with mock.patch.object(has, "Context", lambda *more: self.context(**settings)):
            made = has.Heartbeat(None, None, None)
        self.still = made._context
        self.now = self.still.now
        made._search = mock.Mock(spec=has.Search)
        made._search.find.side_effect = [*worlds, has.Stopped]
        self.waits = []
        self.still.wait = self.waited
        self.on_wait = []
        return made

    def waited(self, until):
        """What comes in each wait: the calls of `on_wait`, in turn; behind them it stops."""
        self.waits.append(round(until - self.still.now, 2))
        if not self.on_wait:
            raise has.Stopped
        step = self.on_wait.pop(0)
        self.still.now = until if step is None else self.still.now
        if step:
            step()

    def of(self, call):
        return [more for name, *more in self.still.told if name == call]

    def test_it_probes_each_beat_and_when_a_link_has_ended(self):
        world = FakeWorld(answers=[True] * 9)
        heartbeat = self.heartbeat(world, beat=10)
        self.on_wait = [None, lambda: heartbeat.on_ask(5, 1), None]
        heartbeat.run()
        self.assertEqual(self.waits, [10, 10, 10, 10])
        self.assertEqual([asks for asks, *_ in self.of("on_answers")], [[], [(5, 1)], []])
        self.assertEqual(self.of("on_world_found"), [[world.world]])
        self.assertEqual(heartbeat.parked["current"], str(HOME))
        self.assertNotIn("connection", heartbeat.parked)            # it has no socket

    def test_a_lost_connection_is_told_and_another_found(self):
        first, second = FakeWorld(answers=[has.Lost("gone", dead=True)]), FakeWorld(answers=[True])
        heartbeat = self.heartbeat(first, second)
        self.on_wait = [lambda: (heartbeat.on_ask(5, 1), heartbeat.on_check(6, 1, [GOOD, BAD]))]
        heartbeat.run()
        self.assertEqual(self.of("lost"), [["gone", True]])
        self.assertEqual(self.of("on_checked"), [[6, 1, [None, None]]])
        self.assertTrue(first.closed)
        self.assertEqual(self.of("on_world_found"), [[first.world], [second.world]])

    def test_a_fault_costs_one_connection_and_a_second(self):
        heartbeat = self.heartbeat(FakeWorld(), FakeWorld())
        heartbeat._search.consider_moving.side_effect = [ValueError("planted"), None]
        self.on_wait = [None]
        with self.assertLogs(has.log, "ERROR"):
            heartbeat.run()
        self.assertEqual(self.of("lost"), [["fault", False]])
        self.assertEqual(self.waits[0], has.FAULT_SECONDS)
        self.assertEqual(len(self.of("on_world_found")), 2)

    def test_a_stop_in_that_second_is_a_stop(self):
        heartbeat = self.heartbeat(FakeWorld())
        heartbeat._search.consider_moving.side_effect = ValueError("planted")
        with self.assertLogs(has.log, "ERROR"):
            heartbeat.run()
        self.assertEqual(heartbeat.parked["current"], str(HOME))

    def test_new_settings_are_tried_beside_the_old_connection(self):
        old, better = FakeWorld(), FakeWorld()
        heartbeat = self.heartbeat(old, beat=10)
        heartbeat._search.try_beside.side_effect = [None, better]
        changed = settings_of((("beat", 10), ("hb_user", "other")))
        again = settings_of((("beat", 10), ("hb_user", "third")))
        same = settings_of((("beat", 20), ("hb_user", "third")))
        self.on_wait = [lambda it=it: heartbeat.on_settings(it) for it in (changed, again, same)]
        heartbeat.run()
        self.assertEqual(heartbeat._search.try_beside.call_args_list, [mock.call(HOME, old)] * 2)
        self.assertEqual((old.closed, len(self.of("on_world_found"))), (True, 2))
        self.assertEqual(self.of("on_wish"), [])

    def test_where_the_world_lacks_something_any_hup_tries_again(self):
        heartbeat = self.heartbeat(FakeWorld())
        for lacks in (False, True):
            heartbeat._lacks = lacks
            heartbeat.on_settings(self.still.settings)
            self.assertEqual(heartbeat._renew, lacks)

    def test_a_changed_address_is_a_wish(self):
        heartbeat = self.heartbeat(FakeWorld())
        heartbeat.on_settings(settings_of((("mush_address", str(AWAY)),)))
        self.assertEqual((heartbeat._course.wanted, self.of("on_wish")), (AWAY, [[None]]))

    def test_a_connection_at_the_login_screen_is_renewed_in_time(self):
        world, other = FakeWorld(), FakeWorld()
        world.renew_at = 1060.0
        heartbeat = self.heartbeat(world, beat=1000)
        heartbeat._entrance.pause.login_after = 5000.0
        trouble = has.Lost("no memory", ours=True)
        heartbeat._entrance.establish = mock.Mock(side_effect=[trouble, other])
        self.on_wait = [None] * 75
        with self.assertLogs(has.log, "ERROR") as logged:
            heartbeat.run()
        self.assertIn("no memory; tried again in 10 s", logged.output[0])
        self.assertEqual(set(self.waits[:-6]), {has.LOOK_SECONDS})
        self.assertEqual((world.closed, len(self.of("on_world_found"))), (True, 2))
        self.assertGreaterEqual(self.still.now, 1060 + has.RENEW_AGAIN_SECONDS)

    def test_checks_wait_while_the_quota_is_for_probes(self):
        world = FakeWorld()
        spare = [has.PROBE_RESERVE]
        world.quota.spare = lambda: spare[0]
        world.can_ask, world.verdicts = lambda pairs: True, lambda pairs: [True] * len(pairs)
        heartbeat = self.heartbeat(world, beat=10)
        heartbeat.on_check(5, 1, [GOOD])
        self.on_wait = [None, None, lambda: spare.append(spare.pop() + 1)]
        heartbeat.run()
        self.assertEqual(self.waits[:3], [has.LOOK_SECONDS] * 3)
        self.assertEqual(self.of("on_checked"), [[5, 1, [True]]])

    def test_a_pause_is_cut_short_when_somebody_wants_to_know(self):
        heartbeat = self.heartbeat()
        self.on_wait = [lambda: heartbeat.on_ask(5, 1)] * 2 + [None]
        heartbeat._pause(100)
        self.assertEqual(len(self.waits), 1)
        heartbeat.on_down()                                         # all know that it is down
        heartbeat._pause(100)
        self.assertEqual(len(self.waits), 3)


# ---- The thread, in front of a scripted world

class TestHeartbeat(Case):
    """The heartbeat alone, in this process: what it asks a world, and what it tells the hub."""

    def start(self, family="pennmush", name=False, **quirks):
        """A world that runs, a heartbeat that got in and probes no more by itself; `name`: its
        address is a name."""
        world, hub = self.world(family, **quirks), Witness()
        address = world.address.replace("127.0.0.1", "localhost") if name else world.address
        heartbeat = self.begin(hub, self.settings(address, family))
        (world_found,), = hub.wait("on_world_found")
        self.assertTrue(world_found.checks)
        return world, hub, heartbeat

    @staticmethod
    def settings(address, family="pennmush"):
        return settings_of((("beat", 1000), ("mush_address", address), ("mush_type", family),
                            ("retry", 0.05)))

    def begin(self, hub, settings, parked=None):
        heartbeat = has.Heartbeat(hub, hub, settings, parked)
        self.addCleanup(heartbeat.join, 5)
        self.addCleanup(heartbeat.mailbox.post, heartbeat.on_stop)
        heartbeat.start()
        return heartbeat

    def check(self, heartbeat, *questions):
        """Ask about several lists of (name, password) at the same moment, numbered from 0."""
        def ask():
            for number, pairs in enumerate(questions):
                pairs = [has.Credentials(b"connect", *pair) for pair in pairs]
                heartbeat.on_check(number, 7, pairs)
        heartbeat.mailbox.post(ask)

    def questions(self, world, word=b"checkpass"):
        """How many pairs each line asked about, without the heartbeat's question about itself."""
        return [line.count(word + b"(") for _, line in list(world.lines) if word in line][1:]

    RIGHT, WRONG = (b"Alice", b"alicepw"), (b"Alice", b"guess")

    def test_many_checks_share_a_line(self):
        world, hub, heartbeat = self.start(silent_start=0.05)
        pairs = [[self.RIGHT], [self.WRONG], [self.WRONG, self.RIGHT]] * 14
        self.check(heartbeat, *pairs)
        self.assertEqual(hub.wait("on_checked", len(pairs)), [
            [number, 7, [pair == self.RIGHT for pair in asked]]
            for number, asked in enumerate(pairs)])
        self.assertEqual(self.questions(world), [20, 20, 16])

    def test_a_line_is_not_longer_than_the_world_reads(self):
        """A password that cannot be asked about is unknown, and alone in that."""
        world, hub, heartbeat = self.start(silent_start=0.05)
        right, wrong = self.RIGHT, self.WRONG
        long, too_long, foreign = ((b"Alice", it) for it in (b"x" * 1500, b"x" * 4000, b"caf\xe9"))
        pairs = [[right], [long], [long], [wrong], [right, too_long], [right], [foreign], [wrong]]
        self.check(heartbeat, *pairs)
        self.assertEqual([verdicts for *_, verdicts in sorted(hub.wait("on_checked", len(pairs)))],
                         [[True], [False], [False], [False], [None, None], [True], [None], [False]])
        longest = has.DIALECTS["pennmush"].longest_line
        self.assertLess(max(len(line) for _, line in world.lines), longest)

    def test_checks_leave_some_of_the_quota_to_probes(self):
        world, hub, heartbeat = self.start(silent_start=0.05)
        self.check(heartbeat, *[[self.RIGHT] * 20] * 120)
        most = 100 - 2 - 20                     # two went at the login: a probe, and about itself
        world.wait(lambda w: len(self.questions(w)) >= most, what="all that the quota allows")
        started = time.monotonic()
        for number in range(1, 11):
            heartbeat.mailbox.post(heartbeat.on_ask, number, 1)
            hub.wait("on_answers", number)
        self.assertLessEqual(len(self.questions(world)), most + 2 + time.monotonic() - started)

    def test_nothing_is_looked_up_in_the_way_of_an_answer(self):
        """Booted while DNS fails, it is back by the address that led to this world before."""
        world, hub, heartbeat = self.start(silent_start=0.05, name=True)
        fails = socket.gaierror(-3, "Temporary failure")
        with mock.patch.object(socket, "getaddrinfo", side_effect=fails) as asked:
            world.boot("heartbeat")
            hub.wait("on_world_found", 2)
        self.assertEqual(asked.call_count, 0)
        self.assertEqual(hub._of("trouble") + hub._of("unreachable"), [])

    def test_a_look_up_of_another_world_keeps_no_verdict_waiting(self):
        world, hub, heartbeat = self.start(silent_start=0.05)
        asked, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def slow(*arguments):
            asked.set()
            go_on.wait(10)
            raise socket.gaierror(-2, "Name or service not known")
        with mock.patch.object(socket, "getaddrinfo", side_effect=slow):
            heartbeat.mailbox.post(heartbeat.on_settings, self.settings("mush.example:9"))
            self.assertTrue(asked.wait(5))
            heartbeat.mailbox.post(heartbeat.on_ask, 5, 1)
            self.assertEqual([asks for asks, *_ in hub.wait("on_answers")], [[(5, 1)]])
            with self.assertLogs(has.log, "ERROR"):
                go_on.set()
                self.assertIn("not known", hub.wait("on_wish", 2)[1][0])
        self.assertEqual(hub._of("lost"), [])

    def test_a_name_is_looked_up_again_when_the_world_is_away_for_long(self):
        world, hub, heartbeat = self.start(silent_start=0.05, name=True)
        asked = threading.Semaphore(0)

        def look_up(*arguments):
            asked.release()
            raise socket.gaierror(-3, "Temporary failure")
        with mock.patch.object(has, "LOOK_UP_SECONDS", 0.2), mock.patch.object(
                socket, "getaddrinfo", look_up):
            world.kill()
            for _ in range(2):
                self.assertTrue(asked.acquire(timeout=10), "it is looked up, and again")
            self.assertFalse([it for it in hub._of("trouble") if "Temporary" in it[1]])
            world.start()
            hub.wait("on_world_found", 2)

    @mock.patch.multiple(has, ASIDE_SECONDS=0.3, TELNET_SECONDS=0.3)
    def test_a_wrong_mush_type_is_named(self):
        """... with the family that the world looks like; flags are not blamed."""
        for family, claimed in (("tinymux", "teenymush"), ("pennmush", "rhostmush"),
                                ("teenymush", "tinymux"), ("rhostmush", "pennmush"),
                                ("tinymush", "tinymux")):
            with self.subTest(family=family, claimed=claimed):
                world = self.world(family)
                settings = settings_of((("mush_address", world.address), ("mush_type", claimed),
                                        ("hb_timeout", 0.5)))
                heartbeat = has.Heartbeat(None, has.Mailbox(), settings)
                with self.assertLogs(has.log, "WARNING") as logged:
                    has.log.warning("the log")
                    try:
                        found = heartbeat.try_once(settings.mush_address[0])
                        self.assertEqual(found.looks, family)
                        self.assertIn(f"looks like a {family}", has.findings(found, settings)[0][1])
                    except has.Lost as lost:
                        self.assertIn(f"it looks like a {family}: is mush_type right?", str(lost))
                self.assertNotIn("flag", "".join(logged.output))
                world.stop()

    def test_its_own_trouble_is_told_as_such(self):
        """No descriptors, no name; a fault in the try."""
        world, hub, heartbeat = self.start(silent_start=0.05)
        for room, method, error in (
                (has.Connector, "_connect", OSError(errno.EMFILE, "Too many open files")),
                (has.AddressBook, "targets", socket.gaierror(-2, "not known")),
                (has.Entrance, "_identified", ValueError("planted"))):
            with self.subTest(error=error), self.assertLogs(has.log, "ERROR"):
                del hub.told[:]
                with mock.patch.object(room, method, side_effect=error):
                    world.boot("heartbeat")
                    hub.wait("trouble", 2)
                hub.wait("on_world_found")
                self.assertEqual(hub._of("unreachable"), [])

    def test_a_try_of_another_address_costs_that_try_only(self):
        """Whatever it raises: the connection that lives is kept."""
        world, hub, heartbeat = self.start(silent_start=0.05)
        with mock.patch.object(has.Entrance, "_identified", side_effect=ValueError("planted")):
            with self.assertLogs(has.log, "ERROR"):
                heartbeat.mailbox.post(heartbeat.on_settings, self.settings("127.0.0.1:9"))
                hub.wait("on_wish", 2)
            heartbeat.mailbox.post(heartbeat.on_ask, 5, 1)
            self.assertEqual([asks for asks, *_ in hub.wait("on_answers")], [[(5, 1)]])
        self.assertEqual(hub._of("lost"), [])

    def test_the_pause_after_a_refusal_ends_with_the_life_in_which_it_began(self):
        """A restart into a broken database refuses everybody; the healed one is not kept waiting.
        """
        world, hub, heartbeat = self.start(silent_start=0.05)
        password = world.players["heartbeat"]
        world.players["heartbeat"] = "broken"
        world.kill()
        world.start()
        found = hub.wait("on_world_found", 2)[-1][0]
        self.assertEqual((found.blind, found.shut), (True, True))
        world.players["heartbeat"] = password
        world.kill()
        world.start()
        found = hub.wait("on_world_found", 3)[-1][0]
        self.assertEqual((found.blind, found.shut), (False, False))

    def test_a_start_id_of_the_same_second_proves_nothing(self):
        """A world that dies in the second in which it was started, and is back in it, is not the
        one of before."""
        with mock.patch.object(has.Connection, "_start_id", return_value="world since today"):
            world, hub, heartbeat = self.start(silent_start=0.05)
            lives = ["world since today"]
            for seen_for in (0, 0, 2):          # the first life began nobody knows when
                if len(lives) > 1:
                    heartbeat._lives.life = lives[-1], time.monotonic() - seen_for
                world.boot("heartbeat")
                lives.append(hub.wait("on_world_found", len(lives) + 1)[-1][0].life)
            self.assertEqual((lives[1], lives[3]), (lives[0], lives[2]))
            self.assertNotEqual(lives[2], lives[1])

    def test_a_start_id_proves_nothing_where_nobody_listened_in_between(self):
        with mock.patch.object(has.Connection, "_start_id", return_value="world since today"):
            world, hub, heartbeat = self.start(silent_start=0.05)
            lives = [hub.wait("on_world_found")[-1][0].life]
            for _ in (1, 2):
                hub.told.clear()
                world.kill()
                hub.wait("unreachable", such=lambda address, why, accepted: not accepted)
                world.start()
                lives.append(hub.wait("on_world_found")[-1][0].life)
                heartbeat._lives.life = lives[-1], 0.0               # nobody knows when it began
            self.assertEqual(len(set(lives)), 3)

    def park(self, hub, heartbeat):
        """An upgrade ends it; return what it leaves."""
        heartbeat.mailbox.post(heartbeat.on_stop)
        self.assertTrue(heartbeat.join(5))
        return json.loads(json.dumps(heartbeat.parked))

    def resume(self, world, hub, parked):
        """The next program's heartbeat, with what the one before has left."""
        return self.begin(hub, self.settings(world.address), parked)

    def test_an_upgrade_takes_its_connection_along(self):
        world, hub, heartbeat = self.start(silent_start=0.05)
        before = hub.wait("on_world_found")[-1][0]
        heartbeat = self.resume(world, hub, self.park(hub, heartbeat))
        after = hub.wait("on_world_found", 2)[-1][0]
        self.assertEqual((after.life, after.checks, len(world.logins)), (before.life, True, 1))
        self.check(heartbeat, [self.RIGHT], [self.WRONG])
        verdicts = [verdicts for *_, verdicts in sorted(hub.wait("on_checked", 2))]
        self.assertEqual(verdicts, [[True], [False]])
        self.assertEqual(hub._of("lost"), [])

    def test_what_another_version_left_otherwise_ends_nobody(self):
        """Without its heartbeat HAS would bring nobody back."""
        world, hub, heartbeat = self.start(silent_start=0.05)
        parked = self.park(hub, heartbeat)
        del parked["known"], parked["current"]
        parked["life"] = {"object": "NeverHeardOf", "slots": {}}
        with self.assertLogs(has.log, "WARNING") as logged:
            self.resume(world, hub, parked)
            hub.wait("on_world_found", 2)
        self.assertEqual(len(logged.output), 3)
        self.assertEqual(len(world.logins), 1)          # its connection is as good as ever

    def test_a_connection_that_another_version_left_otherwise(self):
        """It logs in anew, and tells the hub that it does."""
        world, hub, heartbeat = self.start(silent_start=0.05)
        parked = self.park(hub, heartbeat)
        del parked["connection"]["values"]
        with self.assertLogs(has.log, "WARNING") as logged:
            self.resume(world, hub, parked)
            hub.wait("on_world_found", 2)
        self.assertIn("could not be taken over", logged.output[0])
        self.assertEqual(hub._of("lost"), [["it could not be taken over", False]])
        self.assertEqual(len(world.logins), 2)

    def test_a_fault_of_its_own_is_logged_and_it_starts_anew(self):
        world, hub, heartbeat = self.start(silent_start=0.05)
        outcomes = [RuntimeError("planted"), [True]]
        with mock.patch.object(has.Connection, "verdicts", side_effect=outcomes):
            with self.assertLogs(has.log, "ERROR") as logged:
                self.check(heartbeat, [self.RIGHT], *[[self.WRONG]] * 30)
                hub.wait("lost")
                heartbeat.mailbox.post(heartbeat.on_ask, 5, 1)      # somebody wants to know at once
                hub.wait("on_world_found", 2)
        self.assertRegex(logged.output[0], "the heartbeat starts anew(?s:.*)RuntimeError: planted")
        self.assertEqual(hub.wait("lost"), [["fault", False]])
        self.assertEqual([asks for asks, *_ in hub.wait("on_answers")], [[(5, 1)]])
        self.assertEqual({str(verdicts) for *_, verdicts in hub.wait("on_checked", 11)}, {"[None]"})
        world.wait(lambda w: len(w.online("heartbeat")) == 1 and len(w.logins) == 2,
                   what="the heartbeat is back")


# ======================================================================
# HAS as a program in front of scripted worlds
#
# The main job: one suite of scenarios over all five families. Then the health of the world, telnet
# from end to end, bytes, addresses.
# ======================================================================

EVIL = ["[name(me)]", "x),shutdown(", "x)][create(PWNED,10)][strcat(", "%r", "a\\b", '"q"',
        "a;b", "50%off", "a,b", "{x}", "$1", "#5", "tail\\", "tail%"]


def again(*names):
    """A class decorator: of the tests it inherits, only these are run again.

    The others show nothing new there.
    """
    def chosen(case):
        for name in unittest.defaultTestLoader.getTestCaseNames(case):
            if name not in names and name not in vars(case):
                setattr(case, name, None)
        return case
    return chosen


class Scenarios:
    """What every user of every family may expect; run for each family below.

    How a world went down and a booted heartbeat are the heartbeat's affair, alike in each family:
    TeenyMUSH, whose @shutdown is the strangest, and the real TinyMUX show that.
    """

    family = None
    quit, logout = "QUIT", "LOGOUT"
    logouts = ("LOGOUT",)                       # all ways to type it
    settles = True
    quirks = {}

    def setUp(self):
        self.world = self.make_world()
        self.world.start()
        self.addCleanup(self.world.stop)
        self.has = Has(self, mush_address=self.world.address, mush_type=self.family).wait_up()

    def make_world(self, **quirks):
        return WORLDS[self.family](**{**self.quirks, **quirks})

    def login(self, name="Alice", password="alicepw", line=None, expect=None):
        client = closed_after(self, self.has.client())
        client.send((line or f"connect {name} {password}") + "\r\n")
        self.world.wait(lambda w: w.online(expect or name), what=f"{name} is in")
        self.in_game(client)
        return client

    def in_game(self, client):
        client.barrier()
        return client

    def went_down(self, *clients):
        for client in clients:
            client.expect(re.escape(OFFLINE) + r"\r\n")

    def came_back(self, *clients):
        """Each sees the notice and nothing else, and is in the game."""
        for client in clients:
            client.expect_notice(ONLINE)
        for client in clients:
            self.assertEqual(
                re.sub(rb"(?m)^(You say|\S+ says).*$\s*", b"", client.barrier()).strip(), b"")

    def rides_through(self, client, crash=None):
        """The world crashes and returns: the client is told, is back, and sees nothing else."""
        client.text = b""
        (crash or self.world.kill)()
        self.went_down(client)
        client.text = b""
        self.world.start()
        self.came_back(client)

    def test_crash_and_return(self):
        alice, bob = self.login(), self.login("Bob", "bobpw")
        alice.barrier()
        alice.text = b""
        lurker = closed_after(self, self.has.client())
        lurker.expect(r"(?i)welcome|connect")
        lurker.text = b""
        self.world.kill()
        for client in (alice, bob, lurker):
            client.expect(re.escape(OFFLINE) + r"\r\n")
        newcomer = closed_after(self, self.has.client())
        newcomer.expect(re.escape(OFFLINE))
        newcomer.send("connect Carol carolpw\r\n").expect("when the world returns")
        alice.send("say lost?\r\n").expect(re.escape(UNSENT) + r" say lost\?\r\n")
        lurker.text = newcomer.text = b""
        self.world.start()
        self.came_back(alice, bob)
        newcomer.expect(re.escape(ONLINE))
        self.world.wait(lambda w: w.online("Carol") and
                        len(w.online("Alice")) == 1 == len(w.online("Bob")), what="all")
        self.assertNotIn(b"carolpw", newcomer.seen)
        lurker.expect(re.escape(ONLINE)).strip()
        lurker.expect(r"(?i)welcome|connect")
        alice.send(self.quit + "\r\n").expect_end()
        bob.barrier()
        self.world.boot("Bob")
        bob.expect_end()
        self.in_game(newcomer)

    def test_immediate_restart(self):
        alice, bob = self.login(), self.login("Bob", "bobpw")
        for _ in range(3):
            alice.barrier(), bob.barrier()
            alice.text = bob.text = b""
            self.world.kill()
            self.world.start()
            self.went_down(alice, bob)
            for client in (alice, bob):
                client.expect(re.escape(ONLINE))
        self.in_game(alice), self.in_game(bob)

    def test_shutdown(self):
        alice = self.login()
        self.world.shutdown()
        self.world.wait(lambda w: not w.running, what="the world has ended")
        alice.expect(re.escape(OFFLINE))
        alice.text = b""
        self.world.start()
        self.came_back(alice)

    def test_wrong_then_right_in_one_packet(self):
        client = closed_after(self, self.has.client())
        client.send("connect Alice nope\r\nconnect Alice alicepw\r\n")
        self.world.wait(lambda w: w.online("Alice"), what="Alice is in")
        self.in_game(client)
        client.send("connect Wizard guess\r\n")
        client.barrier()
        self.rides_through(client)

    def test_password_change_is_followed_and_its_loss_survived(self):
        alice = self.login()
        alice.send("@password alicepw=new,er;pw\r\n").expect("(?i)changed")
        self.has.wait_log(rb"changed the password")
        self.world.dump()
        alice.send("@password new,er;pw=newest%20\r\n").expect("(?i)changed")
        alice.barrier()
        self.rides_through(alice, self.world.crash_losing)
        self.rides_through(alice)

    def test_rename(self):
        alice = self.login()
        alice.send("@name me=Alicia\r\n").expect("(?i)set")
        self.has.wait_log(rb"changed the name")
        self.world.dump()
        alice.barrier()
        self.rides_through(alice)
        self.world.wait(lambda w: w.online("Alicia"), what="Alicia is in")

    def test_evil_passwords(self):
        self.evil_players()
        clients = [self.login(f"Evil{n}", password) for n, password in enumerate(EVIL)]
        self.assertEqual(self.evil_done(), [])
        self.world.kill()
        self.went_down(*clients)
        self.world.start()
        for number, client in enumerate(clients):
            client.expect(re.escape(ONLINE))
            self.world.wait(lambda w: w.online(f"Evil{number}"), what=f"Evil{number}")
        self.assertEqual(self.evil_done(), [])

    def evil_players(self):
        for number, password in enumerate(EVIL):
            self.world.players[f"Evil{number}"] = password
        self.world.dump()

    def evil_done(self):
        """What their passwords did to the world."""
        return self.world.evaluated

    def test_refused_on_return(self):
        alice = self.login()
        self.change_password_while_down()
        self.world.start()
        alice.expect(re.escape(REFUSED))
        alice.expect("(?i)welcome|connect")
        alice.send("connect Alice changed\r\n")
        self.world.wait(lambda w: w.online("Alice"), what="Alice is in")
        self.in_game(alice)

    def change_password_while_down(self):
        self.world.kill()
        self.world.players["Alice"] = "changed"

    def test_two_sessions_of_one_character(self):
        first, second = self.login(), self.login()
        first.barrier(), second.barrier()
        first.text = second.text = b""
        self.world.kill()
        self.went_down(first, second)
        self.world.start()
        # there the second's login text cannot be told from the game's
        if not self.settles:
            for client in (first, second):
                client.expect(re.escape(ONLINE))
        else:
            self.came_back(first, second)
        self.world.wait(lambda w: len(w.online("Alice")) == 2, what="both")
        first.send(self.quit + "\r\n").expect_end()
        self.in_game(second)

    def test_logout(self):
        alice = self.login()
        alice.send(self.logout + "\r\n").expect("(?i)welcome|connect")
        self.world.wait(lambda w: not w.online("Alice"), what="Alice is out")
        self.world.kill()
        self.went_down(alice)
        self.world.start()
        alice.expect(re.escape(ONLINE))
        alice.expect("(?i)welcome|connect")
        self.assertFalse(self.world.online("Alice"))

    def next_login(self, client, logout, name="Bob", password="bobpw"):
        """Somebody else logs in on a link that its user has logged out from."""
        client.send(logout + "\r\n").expect("(?i)welcome|connect")
        self.world.wait(lambda w: not w.online("Alice"), what="Alice is out")
        client.send(f"connect {name} {password}\r\n")
        self.world.wait(lambda w: w.online(name), what=f"{name} is in")

    def test_who_logged_in_last_is_brought_back(self):
        for logout in self.logouts:
            with self.subTest(logout):
                client = self.login()
                self.next_login(client, logout)
                client.barrier()
                self.rides_through(client)
                self.assertTrue(self.world.online("Bob"))
                self.assertFalse(self.world.online("Alice"))
                client.send(self.quit + "\r\n").expect_end()

    def test_a_prefix_goes_with_its_owner(self):
        client = self.login()
        client.send("OUTPUTPREFIX <<\r\nthink mine\r\n").expect("<<\r\nmine\r\n")
        self.next_login(client, self.logout)
        client.barrier()
        self.assertEqual(client.send("think yours\r\n").expect("yours\r\n"), b"yours\r\n")
        self.rides_through(client)
        self.assertEqual(client.send("think still yours\r\n").expect("yours\r\n"),
                         b"still yours\r\n")

    def test_logins_are_closed_to_the_heartbeat(self):
        """A world that hangs up on the heartbeat's login lives: nobody notices, and the log says
        why, once.
        """
        alice = self.login()
        self.take_the_heartbeats_flag()
        self.world.disable_logins()
        self.world.boot("heartbeat")
        self.has.wait_log(rb"heartbeat is back \(without heartbeat login\)")
        alice.barrier()
        warning = self.has.wait_log(rb"WARNING .*does not take the heartbeat's login.*").group()
        self.assertRegex(warning, rb"login \((closed by the world|it does not let it in); its last")
        self.assertRegex(
            warning,
            rb"last words: \".*(logins are temporarily disabled|disabling of non-wizard logins)")
        newcomer = closed_after(self, self.has.client())
        newcomer.expect("(?i)connect")
        alice.barrier()
        self.assertNotIn(b"# NOTICE #", alice.seen + newcomer.seen)
        self.assertEqual(self.has.log.count(b"does not take the heartbeat's login"), 1)
        self.world.disable_logins(False)
        after = len(self.has.log)
        self.has.signal(signal.SIGHUP)
        self.has.wait_log(rb"heartbeat is back: ", after=after)
        self.world.wait(lambda w: w.online("heartbeat"), what="the heartbeat is back")
        alice.barrier()
        self.assertNotIn(b"# NOTICE #", alice.seen)

    def take_the_heartbeats_flag(self):
        self.world.wizards = {"Wizard"}

    def test_logins_disabled_after_return(self):
        alice = self.login()
        self.world.kill()
        self.went_down(alice)
        self.world.logins_disabled = True
        before, after = len(self.world.lines), len(self.has.log)
        self.world.start()
        self.has.wait_log(rb"is up", after=after)
        self.world.wait(lambda w: self.tries(before), what="Alice is turned away")
        self.assertFalse(self.world.online("Alice"))
        self.world.disable_logins(False)
        alice.expect(re.escape(ONLINE))
        self.world.wait(lambda w: w.online("Alice"), what="Alice is in")
        self.assertGreater(len(self.tries(before)), 1)
        self.assertNotIn(REFUSED.encode(), alice.seen)

    def tries(self, before):
        """Alice's logins since."""
        return [line for _, line in self.world.lines[before:] if line.startswith(b"connect Alice ")]

    def test_full_is_no_refusal(self):
        """A login that finds the world full is kept, and tried until there is room."""
        alice = self.login()
        self.world.kill()
        self.went_down(alice)
        # the heartbeat takes that place
        self.world.max_players, tried = 1, len(self.world.lines)
        self.world.start()
        self.world.wait(lambda w: any(b"connect Alice" in line for _, line in w.lines[tried:]),
                        what="Alice is refused")
        self.world.max_players = None
        # its last words
        self.assertRegex(alice.expect(re.escape(ONLINE)), rb"(?i)full|too many|maximum number")
        self.world.wait(lambda w: w.online("Alice"), what="Alice is in")
        self.in_game(alice)
        self.assertNotIn(REFUSED.encode(), alice.seen)

    def test_heartbeat_booted_disturbs_nobody(self):
        alice = self.login()
        for _ in range(3):
            self.world.wait(lambda w: w.online("heartbeat"), what="heartbeat")
            self.world.boot("heartbeat")
            self.world.wait(lambda w: w.online("heartbeat"), what="heartbeat again")
        quiet = alice.barrier()
        self.assertNotIn(b"OFFLINE", quiet)
        alice.send(self.quit + "\r\n").expect_end()


class TestTeeny(Scenarios, unittest.TestCase):
    family = "teenymush"
    quirks = {"shutdown_delay": 0.5}
    # has neither
    test_logout = test_who_logged_in_last_is_brought_back = test_a_prefix_goes_with_its_owner = None
    test_logins_disabled_after_return = test_full_is_no_refusal = None
    test_logins_are_closed_to_the_heartbeat = None

    def test_renamed_at_once(self):
        """The heartbeat asks about the old name when the world knows only the new one: that is no
        denial.
        """
        client = closed_after(self, self.has.client())
        client.send("connect Alice alicepw\r\n").expect("Last connect was from")
        client.send("@name me=Alicia\r\n").expect("Set")
        self.has.wait_log(rb"changed the name")
        client.barrier()
        client.text = b""
        self.world.dump()
        self.world.kill()
        self.went_down(client)
        self.world.start()
        client.expect(re.escape(ONLINE))
        self.world.wait(lambda w: w.online("Alicia"), what="Alicia is in")

    def logs_in_behind(self, line, answer):
        """Alice, whose login comes behind a line that brings no outcome, is brought back."""
        client = closed_after(self, self.has.client())
        client.send(line + "\r\n").expect(answer)
        client.log_in(self.world)
        self.rides_through(client)
        self.assertTrue(self.world.online("Alice"))
        return client

    def test_a_password_that_no_player_can_have(self):
        """Text outside Latin-1 brings no outcome, and is shown to a whole room: it is not passed
        on.
        """
        self.logs_in_behind("connect Carol \u65e5\u672c", "cannot read that line")
        self.assertEqual(sum("\u65e5".encode() in line for _, line in self.world.lines), 0)


@again("test_refused_on_return", "test_two_sessions_of_one_character")
class TestTeenyStable(TestTeeny):
    """Builds that speak no telnet and read it as text."""
    quirks, settles = {**TestTeeny.quirks, "stable": True}, False

    def test_heartbeat_gets_in(self):
        self.world.wait(lambda w: w.online("heartbeat"), what="heartbeat")
        self.assertNotRegex(self.has.log, rb"WARNING 127|without heartbeat")

    def test_first_line_after_a_return_is_unspoiled(self):
        alice = self.login()
        self.rides_through(alice)
        alice.send("think first\r\n").expect("first")
        alice, = self.world.online("Alice")
        self.assertRegex(b"\n".join(alice.lines),
                         rb"\A@remotehostname 127.0.0.1=\d+\nconnect Alice alicepw\n"
                         rb"say barrier-\d+\nthink first\Z")

    def test_abbreviated_login_that_it_does_not_know(self):
        """`con` brings the login screen and no outcome: the next outcome is the next line's."""
        for may_check in (True, False):
            with self.subTest(may_check=may_check):
                client = self.logs_in_behind("con Alice wrong", "(?s)Welcome.*Welcome")
                client.send("QUIT\r\n").expect_end()
                self.take_the_heartbeats_flag()
                self.world.boot("heartbeat")
                self.has.wait_log(rb"may not check passwords")


class TestPenn(Scenarios, unittest.TestCase):
    family = "pennmush"
    quirks = {"silent_start": 0.1, "accept_bug": True}
    # see Scenarios
    test_shutdown = test_immediate_restart = test_heartbeat_booted_disturbs_nobody = None

    def test_pairs_known_to_be_wrong_are_not_sent(self):
        """After ten failures nobody behind HAS's address could log in."""
        alice = self.login()
        others = [self.login(name, name.lower() + "pw") for name in ("Bob", "Carol")]
        self.world.kill()
        self.went_down(alice, *others)
        alice.text = b""
        self.world.players.update(Bob="changed", Carol="changed")
        self.world.start()
        self.came_back(alice)
        for other in others:
            other.expect(re.escape(REFUSED))
            other.expect("(?i)connect")
        self.assertEqual((self.world.ip_failures, self.world.failed), ({}, {}))
        others[0].send("connect Bob changed\r\n")
        self.world.wait(lambda w: w.online("Bob"), what="Bob is in")

    def test_users_without_a_login_come_one_after_another(self):
        """Newcomers, and those at the login screen when the world returns: of three at once it
        would forget one.
        """
        clients = [self.has.client() for _ in range(8)]
        for client in clients:
            self.addCleanup(client.close)
            client.expect("(?i)connect(?s:.*)personalize this file!", 5)
        self.world.kill()
        self.went_down(*clients)
        self.world.start()
        for client in clients:
            client.expect(re.escape(ONLINE))
            client.expect("(?i)connect", 5)

    def test_a_connect_that_the_world_forgot(self):
        client = closed_after(self, self.has.client())
        client.expect("(?i)connect")
        self.world.strands = True
        client = closed_after(self, self.has.client())
        client.expect("(?i)connect", 8)
        self.assertFalse(self.world.strands)

    def test_all_socket_settings_are_repeated(self):
        wizard = self.login("Wizard", "wizpw")
        wizard.send(
            "SOCKSET NOQUOTA=yes\r\nSOCKSET PROMPT_NEWLINES=0\r\nSOCKSET\r\nOUTPUTPREFIX <<\r\n")
        wizard.expect("NOQUOTA turned on(?s:.*)No newline will(?s:.*)NOQUOTA +:  YES")
        wizard.barrier()
        before, = self.world.online("Wizard")
        wizard.text = b""
        self.world.kill()
        self.went_down(wizard)
        wizard.text = b""
        self.world.start()
        wizard.expect_notice(ONLINE)
        self.assertEqual(wizard.barrier(), b"<<\r\n")
        after, = self.world.online("Wizard")
        self.assertEqual((after.settings, after.prefix), (before.settings, "<<"))
        self.assertNotIn(b"SOCKSET", after.lines)


@again("test_crash_and_return", "test_refused_on_return", "test_evil_passwords",
       "test_wrong_then_right_in_one_packet", "test_two_sessions_of_one_character",
       "test_all_socket_settings_are_repeated")
class TestPennUnix(TestPenn):
    """Its opening bytes and the order of the telnet differ."""

    def make_world(self, **quirks):
        folder = new_folder(self)
        return super().make_world(unix_path=folder + "/netmush.sock", address_window=5, **quirks)


class TestTinyMUSH(Scenarios, unittest.TestCase):
    family = "tinymush"
    logouts, settles = ("LOGOUT", "logout"), False
    # it crashes instead
    test_logins_disabled_after_return = test_logins_are_closed_to_the_heartbeat = None
    test_full_is_no_refusal = None
    # see Scenarios
    test_shutdown = test_immediate_restart = test_heartbeat_booted_disturbs_nobody = None


class TestTinyMUX(Scenarios, unittest.TestCase):
    family = "tinymux"
    # see Scenarios
    test_shutdown = test_immediate_restart = test_heartbeat_booted_disturbs_nobody = None
    logouts = ("LOGOUT", "LOGOUT ", "LOGOUT now", "logout x", "LogOut", " LOGOUT")

    def test_a_name_made_by_softcode_is_not_the_typed_text(self):
        alice = self.login()
        alice.send("@name me=[strcat(Ze,d)]\r\n").expect("Name set")
        self.world.wait(lambda w: w.online("Zed"), what="Alice is Zed")
        self.has.wait_log(rb"uses softcode in @name")
        alice.barrier()
        self.rides_through(alice, self.world.crash_losing)
        self.assertFalse([line for _, line in self.world.lines if line.startswith(b"connect [")])


class TestRhost(Scenarios, unittest.TestCase):
    family = "rhostmush"
    test_full_is_no_refusal = None              # as on TinyMUX
    # see Scenarios
    test_shutdown = test_immediate_restart = test_heartbeat_booted_disturbs_nobody = None


# ---- The health of the world

class TestWorldHealth(Case):
    """Silence, death, moves."""

    def test_a_short_freeze_disturbs_nobody(self):
        world = self.world()
        has = Has(self, mush_address=world.address, beat=0.1, hb_timeout=1, dead_after=30).wait_up()
        typist = self.client(has, "connect Alice alicepw", world, "Alice")
        listener = self.client(has, "connect Bob bobpw", world, "Bob")
        logins, after = len(world.logins), len(has.log)
        world.freeze()
        has.wait_log(rb"does not answer", after=after)
        typist.send("say anybody?\r\n").expect(re.escape(SILENT) + r"\r\n")
        typist.send("say hello?\r\n")
        newcomer = self.client(has)
        world.thaw()
        has.wait_log(rb"answers again", after=after)
        typist.expect("hello")
        self.assertEqual(typist.seen.count(SILENT.encode()), 1)
        newcomer.expect("Welcome")
        listener.barrier()
        self.assertNotIn(b"NOTICE", listener.seen)
        self.assertEqual(len(world.logins), logins)

    def test_an_upgrade_does_not_thaw_a_world(self):
        """USR2 at a frozen one: it stays silent, and dead_after goes on."""
        world = self.world()
        has = Has(self, mush_address=world.address, beat=0.1, hb_timeout=0.5).wait_up()
        alice = self.client(has, "connect Alice alicepw", world, "Alice")
        after = len(has.log)
        world.freeze()
        has.wait_log(rb"does not answer", after=after)
        began = time.monotonic()
        for _ in range(2):
            after = len(has.log)
            has.signal(signal.SIGUSR2)
            has.wait_log(rb"goes on where", after=after)
        passed = time.monotonic() - began
        status = has.ask("--status", "--json")
        state = json.loads(status.stdout)["world"]
        self.assertEqual((state["health"], status.returncode), ("silent", 1))
        # since the first unanswered probe, not anew
        self.assertGreaterEqual(state["since"], passed - 1)
        self.assertNotRegex(has.log[after:], rb"is up|answers again")
        world.thaw()
        has.wait_log(rb"answers again", after=after)
        alice.send("say hello\r\n").expect("You say")
        self.assertNotIn(OFFLINE.encode(), alice.seen)

    def test_a_hup_that_cannot_come_true_changes_nothing_for_newcomers(self):
        """mush_ssl switched on for a world that speaks none: newcomers still come in as before,
        over an upgrade, too.
        """
        world = self.world("teenymush")
        has = Has(self, mush_address=world.address, beat=0.2).wait_up()
        after = len(has.log)
        has.configure(mush_ssl="yes", mush_ssl_verify="no")
        has.signal(signal.SIGHUP)
        has.wait_log(rb"the new settings do not work with", after=after)
        self.client(has, "connect Alice alicepw", world, "Alice")
        has.signal(signal.SIGUSR2)
        has.wait_log(rb"goes on where", after=after)
        self.client(has, "connect Bob bobpw", world, "Bob")

    def test_a_hup_that_would_cost_the_heartbeat_its_login_or_its_family_changes_nothing(self):
        world = self.world()
        has = Has(self, mush_address=world.address, beat=0.2).wait_up()
        for change, back in ((dict(hb_pass="wrong"), dict(hb_pass="heartbeat")),
                             (dict(mush_type="rhostmush"), dict(mush_type="auto"))):
            after = len(has.log)
            has.configure(**change)
            has.signal(signal.SIGHUP)
            has.wait_log(rb"the new settings do not work with .*the old connection is kept", 15,
                         after)
            self.client(has, "connect Alice alicepw", world, "Alice").close()
            self.assertRegex(has.ask("--status").stdout, r"\(tinymux\)(?s:.*)logged in")
            has.configure(**back)
            has.signal(signal.SIGHUP)
            has.wait_log(rb"HUP: settings read", 10, after)

    def test_a_heartbeat_that_gets_in_after_a_hup_is_said_to(self):
        world = self.world()
        has = Has(self, mush_address=world.address, hb_pass="wrong", beat=0.2)
        has.wait_log(rb"refuses the heartbeat's login")
        has.configure(hb_pass="heartbeat")
        has.signal(signal.SIGHUP)
        has.wait_log(rb"the heartbeat heartbeat is logged in now")      # ... and tells the hub
        poll_until(lambda: "heartbeat: heartbeat logged in" in has.ask("--status").stdout,
                   lambda: has.ask("--status").stdout)

    def test_a_long_freeze_is_a_death(self):
        world = self.world()
        has = Has(self, mush_address=world.address, beat=0.1, hb_timeout=0.5,
                  dead_after=1.5).wait_up()
        alice = self.client(has, "connect Alice alicepw", world, "Alice")
        after = len(has.log)
        world.freeze()
        has.wait_log(rb"the world is down", after=after)
        alice.expect(re.escape(OFFLINE))
        world.thaw()
        alice.expect(re.escape(ONLINE))
        alice.barrier()

    def test_failover_and_failback(self):
        first, second = self.world(), self.world("rhostmush")
        has = Has(self, mush_address=f"{first.address}, {second.address}", beat=0.1,
                  failover_after=0.5, failback_after=0.5).wait_up()
        alice = self.client(has, "connect Alice alicepw", first, "Alice")
        first.kill()
        alice.expect(re.escape(OFFLINE))
        alice.expect(re.escape(ONLINE))
        second.wait(lambda w: w.online("Alice"), what="Alice on the second")
        alice.barrier()
        has.wait_log(rb"moves from .* to .*: 1 user taken along")
        first.start()
        alice.expect(re.escape(MOVED))
        alice.expect(re.escape(ONLINE))
        first.wait(lambda w: w.online("Alice"), what="Alice on the first")
        alice.barrier()
        second.wait(lambda w: not w.online("Alice"), what="nobody left on the second")

    def test_hup_moves_users_only_once_the_new_world_is_confirmed(self):
        first, second = self.world(), self.world("teenymush")
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            typo = f"127.0.0.1:{closed.getsockname()[1]}"
            has = Has(self, mush_address=first.address, beat=0.2).wait_up()
            alice = self.client(has, "connect Alice alicepw", first, "Alice")
            has.configure(mush_address=typo)
            has.signal(signal.SIGHUP)
            has.wait_log(rb"cannot take over")
            alice.barrier()
        has.configure(mush_address="nonsense", beat="soon")
        has.signal(signal.SIGHUP)
        has.wait_log(rb"old settings stay in force")
        has.configure(mush_address=second.address, beat=0.2)
        has.signal(signal.SIGHUP)
        alice.expect(re.escape(MOVED))
        alice.expect(re.escape(ONLINE))
        second.wait(lambda w: w.online("Alice"), what="Alice on the second")
        first.wait(lambda w: not w.online("Alice"), what="nobody left on the first")
        self.assertNotIn(OFFLINE.encode(), alice.seen)

    def test_hup_without_a_change_moves_nobody(self):
        world = self.world()
        has = Has(self, mush_address=world.address).wait_up()
        alice = self.client(has, "connect Alice alicepw", world, "Alice")
        for _ in range(3):
            after = len(has.log)
            has.signal(signal.SIGHUP)
            has.wait_log(rb"HUP: settings read", after=after)
        alice.barrier()
        self.assertNotIn(b"NOTICE", alice.seen)

    def test_hup_to_a_third_world_while_two_are_dead(self):
        worlds_ = [self.world() for _ in range(3)]
        has = Has(self, mush_address=f"{worlds_[0].address},{worlds_[1].address}", beat=0.1,
                  failover_after=0.2).wait_up()
        alice = self.client(has, "connect Alice alicepw", worlds_[0], "Alice")
        worlds_[0].kill(), worlds_[1].kill()
        alice.expect(re.escape(OFFLINE))
        has.configure(mush_address=worlds_[2].address)
        has.signal(signal.SIGHUP)
        alice.expect(re.escape(ONLINE))
        worlds_[2].wait(lambda w: w.online("Alice"), what="Alice on the third")

    def test_both_dead_and_one_returns(self):
        first, second = self.world(), self.world()
        has = Has(self, mush_address=f"{first.address},{second.address}", beat=0.1,
                  failover_after=0.3).wait_up()
        alice = self.client(has, "connect Alice alicepw", first, "Alice")
        second.kill(), first.kill()
        alice.expect(re.escape(OFFLINE))
        second.start()
        alice.expect(re.escape(ONLINE))
        second.wait(lambda w: w.online("Alice"), what="Alice on the second")

    def test_restart_in_place_disturbs_nobody(self):
        for family in ("tinymux", "rhostmush", "pennmush", "tinymush"):
            with self.subTest(family):
                world = self.world(family)
                has = Has(self, mush_address=world.address, beat=0.05, hb_timeout=0.5).wait_up()
                alice = self.client(has, "connect Alice alicepw", world, "Alice")
                world.restart_in_place()
                alice.barrier()
                newcomer = self.client(has)
                newcomer.expect("(?i)connect")
                self.assertNotIn(OFFLINE.encode(), alice.seen + newcomer.seen)
                self.assertEqual(len(world.online("Alice")), 1)

    def test_heartbeat_that_may_not_log_in(self):
        for family in ("teenymush", "pennmush", "tinymush", "tinymux", "rhostmush"):
            with self.subTest(family):
                world = self.world(family, players={"Alice": "alicepw", "Bob": "bobpw"}, **(
                    {"silent_start": 0.05} if family == "pennmush" else {}))
                has = Has(self, mush_address=world.address, beat=0.1, hb_timeout=1).wait_up()
                has.wait_log(rb"refuses the heartbeat's login")
                alice = self.client(has, "connect Alice alicepw", world, "Alice")
                bob = self.client(has, "connect Bob bobpw", world, "Bob")
                world.boot("Bob")
                bob.expect_end()
                restart(world, alice)
                alice.barrier()

    def test_heartbeat_without_rights(self):
        for family in ("teenymush", "pennmush", "rhostmush"):
            with self.subTest(family):
                world = self.world(family)
                world.wizards = {"Wizard"}
                has = Has(self, mush_address=world.address, beat=0.1).wait_up()
                has.wait_log(rb"may not check passwords: set its (WIZARD|ROYALTY or IMMORTAL) flag")
                alice = self.client(has, "connect Alice alicepw", world, "Alice")
                restart(world, alice)

    def test_heartbeat_without_the_flag_it_needs_while_logins_are_disabled(self):
        for family in ("tinymux", "tinymush"):
            with self.subTest(family):
                world = self.world(family)
                has = Has(self, mush_address=world.address).wait_up()
                self.assertRegex(has.probe(), "heartbeat's flag: nothing is missing")
                self.assertNotIn(b"WARNING 127", has.log)
                world.wizards = {"Wizard"}
                world.boot("heartbeat")
                has.wait_log(rb"WARNING .*the heartbeat heartbeat has no WIZARD flag")
                self.assertRegex(has.probe(), "heartbeat's flag: lacks WIZARD")

    def test_a_heartbeat_shut_out_tries_seldom_and_gets_in_by_itself(self):
        text = pathlib.Path(HAS).read_text().replace(
            "LOGIN_CLOSED_SECONDS = 30 ", "LOGIN_CLOSED_SECONDS = 1 ")
        with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
            script.write(text)
            script.flush()
            world = self.world()
            world.wizards = {"Wizard"}
            has = Has(self, script=script.name, mush_address=world.address, beat=0.05).wait_up()
            alice = self.client(has, "connect Alice alicepw", world, "Alice")
            world.disable_logins()
            started, before = time.monotonic(), len(world.lines)
            world.boot("heartbeat")
            world.wait(lambda w: len(self.tries(w.lines[before:])) == 2, what="two tries")
            self.assertGreater(time.monotonic() - started, 1)
            has.wait_count(b"does not take the heartbeat's login", 2)
            self.assertEqual(
                len(re.findall(rb"WARNING.*does not take the heartbeat's login", has.log)), 1)
            world.disable_logins(False)
            world.wait(lambda w: w.online("heartbeat"), what="the heartbeat is in")
            alice.barrier()
            self.assertNotIn(b"NOTICE", alice.seen)

    @staticmethod
    def tries(lines):
        return [line for _, line in lines if line.startswith(b"connect heartbeat")]

    def test_families_are_recognised(self):
        for family in ("teenymush", "pennmush", "tinymush", "tinymux", "rhostmush"):
            with self.subTest(family):
                has = Has(self, mush_address=self.world(family).address)
                self.assertIn(f"is a {family}, recognised".encode(),
                              has.wait_log(rb".* is a .*").group())

    def test_failover_after_0_waits_for_a_hup(self):
        other = self.world()
        with socket.create_server(("127.0.0.1", 0)) as dud:
            dud.settimeout(5)
            address = f"127.0.0.1:{dud.getsockname()[1]}"
            has = Has(self, mush_address=f"{address}, {other.address}", failover_after=0,
                      retry=0.05)
            for _ in range(10):
                dud.accept()[0].close()
        self.assertEqual(other.accepted, 0)
        has.configure(mush_address=f"{other.address}, {address}")
        has.signal(signal.SIGHUP)
        has.wait_up()

    def test_backlog_of_one_and_many_users(self):
        world = self.world(
            "teenymush", players={"heartbeat": "heartbeat", **{f"u{n}": "pw" for n in range(40)}})
        has = Has(self, mush_address=world.address).wait_up()
        users = [self.client(has, f"connect u{n} pw", world, f"u{n}") for n in range(40)]
        restart(world, *users)
        world.wait(lambda w: all(w.online(f"u{n}") for n in range(40)), what="all are in")
        for user in users:
            self.assertNotRegex(user.barrier(), rb" has (re-?)?connected")
        users[0].send("QUIT\r\n").expect_end()
        users[1].barrier()

    def test_plain_world(self):
        world = self.world("plain")
        has = Has(self, mush_address=world.address, mush_type="plain", beat=0.2).wait_up()
        one, two = self.client(has), self.client(has)
        one.expect("Welcome"), two.expect("Welcome")
        one.send("QUIT\r\n").expect_end()
        restart(world, two)
        two.expect("Welcome")


class TestCrashes(Case):
    def test_guests_without_a_password_are_held_and_told(self):
        for family in ("tinymux", "pennmush"):
            with self.subTest(family):
                world = self.world(family, guests=True, silent_start=0.1)
                has = Has(self, mush_address=world.address, login_hold=0.2).wait_up()
                newcomer, guest = self.client(has), self.client(
                    has, "connect guest", world, "Guest")
                newcomer.expect("(?i)connect")
                world.kill()
                guest.expect(re.escape(OFFLINE))
                self.assertIn(b"come back later", newcomer.expect_end())
                guest.send("anybody?\r\n").expect(re.escape(UNSENT) + r" anybody\?")
                world.start()
                guest.expect(r"ONLINE again\. Guests have to log in again\.\r\n")
                guest.expect("(?i)connect")
                self.assertFalse(world.online("Guest"))

    def test_twenty_crashes_with_eight_users_and_resets(self):
        world = self.world("tinymux", reset_on_kill=True,
                           players={"heartbeat": "heartbeat", **{f"u{n}": "pw" for n in range(8)}})
        has = Has(self, mush_address=world.address, beat=0.5).wait_up()
        users = [self.client(has, f"connect u{n} pw", world, f"u{n}") for n in range(8)]
        for round_ in range(20):
            world.kill()
            if round_ % 2:
                for user in users:
                    user.expect(re.escape(OFFLINE))
            world.start()
            for user in users:
                user.expect(re.escape(ONLINE))
            world.wait(lambda w: all(len(w.online(f"u{n}")) == 1 for n in range(8)),
                       what="160 of 160")
        for user in users:
            user.barrier()

    def test_who_kills_the_world_is_brought_back_no_more(self):
        world = self.world("tinymux")
        has = Has(self, script=HAS, mush_address=world.address,
                  suspect_notice="# SUSPECT").wait_up()
        alice = self.client(has, "connect Alice alicepw", world, "Alice")
        mallory = self.client(has, "connect Bob bobpw", world, "Bob")
        deaths = 0
        while b"brings it back no more" not in has.log and deaths < 10:
            world.wait(lambda w: w.online("Bob"), 15, what="Bob is in, and kills it")
            deaths += 1
            alice.text = b""
            world.kill()
            alice.expect(re.escape(OFFLINE))
            world.start()
            has.wait_count(b"is up", deaths + 1)
        self.assertLess(deaths, 10)     # 4 at best; more where this machine is slow to kill it
        mallory.expect("# SUSPECT(?s:.*)Welcome")
        alice.expect(re.escape(ONLINE), 15)
        alice.barrier()
        self.assertFalse(world.online("Bob"))
        self.assertIn(b"just after bob had come back", has.log)

    def test_a_crowd_is_back_at_the_servers_own_pace(self):
        """Scripted servers with the real ones' pace; who waits for a name look-up holds up nobody.
        One after another, with 40 ms of delayed ACK each, 20 users would need a second more."""
        for family, most, quirks in (
                ("teenymush", 1, {}), ("rhostmush", 4, {}), ("tinymush", 4, {}),
                ("tinymux", 64, {}),
                ("pennmush", 6, dict(accept_bug=True, silent_start=0.1, LOOK_UP_SECONDS=1.5,
                                     lost_look_ups=range(8, 13)))):
            with self.subTest(family), contextlib.ExitStack() as stack:
                players = {"heartbeat": "heartbeat", **{f"u{n}": f"pwu{n}" for n in range(20)}}
                world = WORLDS[family](players=players, paced=True, quota=False, **quirks)
                bench = ReturnBench(stack, world, 20, most)
                alone = bench.alone()
                bench.enter()
                for _ in range(3):              # another program may have had the processor
                    first, half, _, last, cpu = times = bench.back(0.2)
                    if first < 0.5 and max(half, last) < alone + 0.5 and cpu < 0.5:
                        break
                else:
                    self.fail(f"the server alone needs {alone} s, behind HAS: {times}")

    def test_a_hundred_users_are_told_and_back_in_time(self):
        # above, the world that tells all of each sets the pace; --bench has more
        count = 100
        world = self.world("tinymux", quota=False, players={
            "heartbeat": "heartbeat", **{f"u{n}": "pw" for n in range(count)}})
        has = Has(self, mush_address=world.address).wait_up()
        users = [has.client() for _ in range(count)]
        for number, user in enumerate(users):
            self.addCleanup(user.close)
            user.send(f"connect u{number} pw\r\n")
        world.wait(lambda w: len(w.logins) == count + 1, 20, "all in")
        has.wait_count(b": logged in", count)
        restart(world, *users)


# ---- Telnet: what a new world must be told, and what a client must not see twice

EVERYTHING = {BINARY, ECHO, SGA, EOR, TTYPE, NAWS, CHARSET, MSSP, GMCP}
DATE = re.compile(rb"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d(?:\.\d+)? \d{4}|(?<=C\.)\d+")


class TelnetCase(unittest.TestCase):
    """What all tests here use."""

    def setup_world(self, family, **quirks):
        world = WORLDS[family](**{"silent_start": 0.1, "quota": False, **quirks})
        world.start()
        self.addCleanup(world.stop)
        return world

    def login(self, name="Alice", agrees=EVERYTHING, first=b"", has=None, world=None):
        client = closed_after(self, Terminal((has or self.has).port, agrees))
        client.send(first)
        client.expect("(?i)welcome|connect")
        client.send(f"connect {name} {name.lower()}pw\r\n")
        (world or self.world).wait(lambda w: w.online(name), what=f"{name} is in")
        self.addCleanup((world or self.world).wait, lambda w: not w.online(name),
                        what=f"{name} has left")
        self.addCleanup(client.close)
        client.barrier()
        return client

    def crash(self, *clients):
        self.world.kill()
        for client in clients:
            client.expect(re.escape(OFFLINE) + r"\r\n")

    def came_back(self, client, world=None, name="Alice"):
        """Only the notice was shown."""
        client.expect_notice(ONLINE, 8)
        conn = (world or self.world).wait(lambda w: w.online(name), what=f"{name} is in")[0]
        self.assertEqual(re.sub(rb"\S+ says.*\r?\n", b"", client.barrier()).strip(), b"")
        return conn

    def rides_through(self, client, *others, name="Alice"):
        """The world crashes and returns; what it knows of the client's new link."""
        self.crash(client, *others)
        self.world.start()
        return self.came_back(client, name=name)

    def read_by_has(self, bob):
        """HAS has read what other clients sent before: it answered one that sent later."""
        bob.barrier()


class TelnetFamily:
    """Shared by the five families: one world and one HAS for the whole class."""
    family, quirks, knows, offers, gmcp = None, {}, (), (), False
    first = b""                                     # what the client says unasked

    @classmethod
    def setUpClass(cls):
        owner = types.SimpleNamespace(addCleanup=cls.addClassCleanup)
        cls.world = cls.make_world(owner)
        cls.agree_to_echo()
        cls.world.start()
        cls.addClassCleanup(cls.world.stop)
        cls.has = Has(owner, mush_address=cls.world.address, mush_type=cls.family,
                      beat=0.5).wait_up()

    @classmethod
    def make_world(cls, owner):
        return WORLDS[cls.family](quota=False, **cls.quirks)

    @classmethod
    def agree_to_echo(cls):
        """The world does not answer the answer to its own WILL ECHO."""
        cls.world.ANSWERS = {**cls.world.ANSWERS, (DO, ECHO): b""}

    def setUp(self):
        if not self.world.running:                  # another test failed half-way
            self.world.start()
        self.world.wait(lambda w: w.online("heartbeat"), what="heartbeat")

    def tearDown(self):
        self.has.check_log()                        # now, for it serves the whole class

    def settled(self, name="Alice", size=(132, 43)):
        """Wait until the world knows of the client what it can know; return the connection."""
        def seen(world):
            conn = (world.online(name) or [None])[0]
            return (conn and (NAWS not in self.knows or conn.size == size) and
                    (TTYPE not in self.knows or conn.ttype == "TINTIN++") and
                    (CHARSET not in self.knows or conn.charset == "UTF-8") and
                    (not self.gmcp or CORE_HELLO in conn.raw and CORE_SUPPORTS in conn.raw) and
                    conn)
        return self.world.wait(seen, what=f"{name}'s terminal is known")

    def test_return_restores_everything_and_asks_nothing(self):
        alice = self.login(first=self.first)
        before = self.settled()
        # the second follows all answers to what came before the first
        alice.barrier(), alice.barrier()
        told = {option: set(verbs) for option, verbs in before.options.items()}
        count, on = len(alice.commands), set(alice.on)
        conn = self.rides_through(alice)
        self.assertIs(self.settled(), conn)
        alice.barrier()
        asked = [c for c in alice.commands[count:] if c[1:3] != bytes((SB, MSSP))]
        self.assertEqual(asked, [])
        self.assertEqual(alice.on, on)
        if self.family != "tinymush":
            self.assertEqual({o: v for o, v in conn.options.items() if v & {"DO", "WILL"} and
                              o != 86},
                             {o: v for o, v in told.items() if v & {"DO", "WILL"}})
        self.assertLess(len(conn.raw), 2000)        # no loop

    def test_size_changed_during_the_outage_and_during_the_return(self):
        alice, bob = self.login(first=self.first), self.login("Bob", ())
        self.settled()
        self.crash(alice, bob)
        alice.resize(254, 10)
        alice.send("nobody hears\r\n").expect("nobody hears\r\n")
        self.world.start()
        self.came_back(alice)
        self.settled(size=(254, 10)) if NAWS in self.knows else None
        bob.expect(re.escape(ONLINE))
        self.crash(alice, bob)
        self.world.start()
        self.world.wait(lambda w: len(w.connections) > 0, what="the heartbeat is back")
        # before, in or behind the return: wherever it falls
        alice.resize(90, 10)
        self.came_back(alice)
        self.settled(size=(90, 10)) if NAWS in self.knows else None
        bob.expect(re.escape(ONLINE))

    def test_echo_left_on_is_switched_off(self):
        alice, lurker = self.login(first=self.first), Terminal(self.has.port)
        self.addCleanup(lurker.close)
        lurker.expect("(?i)welcome|connect")
        conn = self.settled()
        alice.barrier()
        self.world._do(lambda: [c.write(offer((WILL, ECHO))) for c in self.world.connections])
        for client in (alice, lurker):
            client.wait(lambda c: (DO, ECHO) in c.on, "echo is on")
        self.world.wait(lambda w: "DO" in conn.options.get(ECHO, ()), what="echo was agreed")
        count = len(alice.commands)
        conn = self.rides_through(alice, lurker)
        alice.wait(lambda c: (DO, ECHO) not in c.on, "echo is off")
        alice.barrier()
        self.assertEqual([c for c in alice.commands[count:] if c[1:3] != bytes((SB, MSSP))],
                         [offer((WONT, ECHO))])
        self.assertNotIn(offer((DONT, ECHO)), conn.raw)
        lurker.expect(re.escape(ONLINE))
        lurker.expect("(?i)welcome|connect")
        lurker.wait(lambda c: (DO, ECHO) not in c.on, "echo is off at the login screen too")

    def test_unnegotiating_client_gets_the_bytes_of_a_direct_connection(self):
        self.world.wait(lambda w: not set(c.player for c in w.online()) - {"heartbeat"},
                        what="all have left")
        twin = self.setup_world(self.family, **self.quirks)
        beat = closed_after(self, Terminal(twin.port, ()))
        beat.send("connect heartbeat heartbeat\r\n")
        twin.wait(lambda w: w.online("heartbeat"), what="a heartbeat of its own")
        near, far = self.conversation(twin, twin.port), self.conversation(self.world, self.has.port)
        commands = [[t for t in tokens(raw)[0] if is_command(t)] for raw in (near, far)]
        self.assertEqual(*commands)
        # HAS spoke first (PROXY): the same offers come before the banner
        if self.family == "rhostmush":
            near, far = (b"".join(t for t in tokens(raw)[0] if not is_command(t))
                         for raw in (near, far))
        self.assertEqual(near, far)

    def conversation(self, world, port):
        client = closed_after(self, Terminal(port, ()))
        client.expect("(?i)welcome|connect")
        client.send("connect Carol wrong\r\n").expect("password")
        client.send("connect Carol carolpw\r\n")
        world.wait(lambda w: w.online("Carol"), what="Carol is in")
        client.send("say one\r\n").expect('You say,? "one"')
        if world.RESTART:
            world.restart_in_place()
        client.send("say two\r\n").expect('You say,? "two"\r?\n')
        if self.family == "teenymush":
            world.keepalive()
        client.send("say three\r\n").expect('You say,? "three"\r?\n')
        client.close()
        world.wait(lambda w: not w.online("Carol"), what="Carol has left")
        return DATE.sub(b"DATE", client.raw).replace(b"from localhost", b"from 127.0.0.1")

    def test_silent_client_gets_no_telnet_on_return(self):
        alice = self.login(agrees=())
        count = len(alice.commands)
        self.rides_through(alice)
        self.assertEqual(alice.commands[count:], [])

    def test_character_at_a_time(self):
        client, bob = Terminal(self.has.port), self.login("Bob", ())
        self.addCleanup(client.close)
        client.send(self.first).expect("(?i)welcome|connect")
        # TeenyMUSH keeps BS in the text
        rub = {"teenymush": b"", "tinymush": b"x\x7f"}.get(self.family, b"x\b")
        for byte in b"con%snect Alice alic%sepw\r\n" % (rub, rub):
            client.send(bytes([byte]))
            self.read_by_has(bob)
        self.world.wait(lambda w: w.online("Alice"), what="Alice is in")
        self.addCleanup(self.world.wait, lambda w: not w.online("Alice"), what="Alice has left")
        self.addCleanup(client.close)
        for byte in b"say by bytes\r\n":
            client.send(bytes([byte]))
        client.expect("by bytes")
        client.barrier()
        self.rides_through(client, bob)
        bob.expect(re.escape(ONLINE))
        self.settled()

    def test_restart_in_place_offers_again(self):
        if not self.world.RESTART:
            self.skipTest("no in-place restart")
        alice = self.login(first=self.first)
        self.settled()
        for returned in (False, True):
            alice.barrier()
            conn = self.settled()
            # the last answers are on their way; now they are there
            alice.barrier(), alice.barrier()
            on, raw = set(alice.on), len(alice.raw)
            sent = len(conn.raw)
            self.world.restart_in_place()
            alice.barrier(), alice.barrier()
            self.assertEqual(alice.on, on)
            expected = self.world.RESTART[4]
            # what HAS has answered a moment ago is swallowed
            if returned:
                expected = b"".join(re.findall(rb"(?s)\xff\xfa.*?\xff\xf0", expected))
            self.assertEqual(b"".join(t for t in tokens(alice.raw[raw:])[0] if is_command(t)),
                             expected)
            answers = [t for t in tokens(bytes(conn.raw[sent:]))[0] if is_command(t)]
            self.assertEqual(answers, [sub(CHARSET, b"\x02UTF-8")] if expected else [])
            self.rides_through(alice)

    def test_compression_is_refused(self):
        alice, lurker = self.login(first=self.first), Terminal(self.has.port, {86})
        self.addCleanup(lurker.close)
        lurker.expect("(?i)welcome|connect")
        self.settled()
        conn = self.world.online("Alice")[0]
        if self.family != "tinymush":
            offers = offer((WILL, 85), (WILL, 86), (WILL, 87), (DO, 86)) + b"x\r\n"
            everybody = lambda: [c.write(offers) for c in self.world.connections]
            self.world._do(everybody)
            for client in (alice, lurker):
                client.expect("x\r\n")
                self.assertFalse([c for c in client.commands if c[2:] in (b"U", b"V", b"W")])
            for conn in [c for c in self.world.connections if c.player != "heartbeat"]:
                self.world.wait(lambda w: offer((DONT, 85), (DONT, 86), (DONT, 87), (WONT, 86)) in
                                b"".join(re.findall(rb"\xff[\xfb-\xfe][UVW]", conn.raw)),
                                what="refusals")
        mark, conn = len(conn.raw), self.world.online("Alice")[0]
        for client in (alice, lurker):
            client.send(offer((DO, 86), (DO, 85), (DO, 87), (WILL, 87), (DONT, 86), (WONT, 86)))
            client.wait(lambda c: offer((WONT, 86), (WONT, 85), (WONT, 87), (DONT, 87)) in c.raw,
                        "HAS refuses")
        alice.barrier()
        self.assertNotRegex(bytes(conn.raw[mark:]), rb"\xff[\xfb\xfd][UVW]")

    def test_notice_inside_what_is_unfinished(self):
        alice = self.login(first=self.first)
        for tail, shown in ((b"\x1b[1;3", b"\x1b[1;3m\x1b[0m\r\n"),
                            (b"\x1b]0;title", b"\x1b]0;title\x1b\\\x1b[0m\r\n"),
                            (b"caf\xc3", b"caf\xc3\x1b[0m\r\n"),
                            (b"Prompt> \xff\xfa\xc9Core.Pi", b"Prompt> \x1b[0m\r\n")):
            alice.text, start = b"", len(alice.raw)
            self.world.emit("Alice", tail)
            alice.expect(re.escape(tail.partition(b"\xff")[0]))
            self.crash(alice)
            # BINARY comes late
            text = b"".join(it for it in tokens(alice.raw[start:])[0] if not is_command(it))
            self.assertIn(shown + OFFLINE.encode(), text)
            self.assertEqual(alice.rest, b"")
            self.world.start()
            self.came_back(alice)

    def test_settings_are_replayed(self):
        if self.family == "teenymush":
            self.skipTest("no such settings")
        alice = self.login(first=self.first)
        lines = ["PUEBLOCLIENT 2.50", "OUTPUTPREFIX <<", "OUTPUTSUFFIX >>"]
        lines += ["SCREENWIDTH 132", "SCREENHEIGHT 43"] * (self.family == "pennmush")
        alice.send("\r\n".join(lines) + "\r\n")
        alice.barrier()
        before = self.world.online("Alice")[0]
        alice.text = b""
        self.crash(alice)
        self.world.start()
        alice.expect_notice(ONLINE, 8)
        conn = self.world.wait(lambda w: w.online("Alice"), what="Alice is in")[0]
        shown = alice.barrier()
        self.assertEqual((conn.prefix, conn.suffix, conn.settings),
                         (before.prefix, before.suffix, before.settings))
        self.assertIn(shown, (b"", b"<<\r\n"), "the replay is not to be seen")


class TestTelnetTeeny(TelnetFamily, TelnetCase):
    family, knows, offers = "teenymush", (NAWS, TTYPE), True


class TestTelnetPenn(TelnetFamily, TelnetCase):
    family, knows, offers, gmcp, quirks = "pennmush", (NAWS, TTYPE,
                                                       CHARSET), True, True, {"silent_start": 0.1}

    def test_a_client_that_answers_every_offer_kills_nobody(self):
        """Not as RFC 1143 wants it: each repeated WILL CHARSET brings another DO."""
        class Eager(Terminal):
            def _answer(self, token):
                self.on.clear()
                return super()._answer(token)
        eager = closed_after(self, Eager(self.has.port))
        eager.expect("(?i)connect")
        eager.send(self.first + b"connect Alice alicepw\r\n")
        self.world.wait(lambda w: w.online("Alice") and w.online("Alice")[0].utf8,
                        what="CHARSET is settled")
        for _ in range(2):                          # before and after a return
            self.world.repeat_offers()
            eager.wait(lambda c: c.raw.endswith(offer((WILL, CHARSET), (WILL, MSSP),
                                                      (WILL, GMCP))) or True, "the offers")
            eager.barrier(), eager.barrier()
            eager.send(offer((DO, CHARSET)) + sub(CHARSET, b"\x02UTF-8") + offer((DO, CHARSET)))
            eager.barrier()
            self.rides_through(eager)
        eager.close()
        self.world.wait(lambda w: not w.online("Alice"), what="Alice has left")

    def test_a_password_with_an_accent(self):
        """With CHARSET one character is one `?` to the world, without it one byte is
        (worlds/pennmush.md a).
        """
        for name, read_as, agrees in (("Uma", "p?pin", EVERYTHING), ("Una", "p??pin", ())):
            with self.subTest(name):
                self.world.players[name] = read_as
                client = closed_after(self, Terminal(self.has.port, agrees))
                client.expect("(?i)connect")
                self.world.wait(lambda w: w.connections[-1].utf8 == bool(agrees),
                                what="CHARSET is settled")
                client.send(f"connect {name} p\u00e9pin\r\n")
                self.world.wait(lambda w: w.online(name), what=f"{name} is in")
                client.barrier()
                conn = self.rides_through(client, name=name)
                self.assertEqual(conn.utf8, bool(agrees))
                client.close()
                self.world.wait(lambda w: not w.online(name), what=f"{name} has left")


class TestTelnetPennUnix(TestTelnetPenn):
    @classmethod
    def make_world(cls, owner):
        folder = new_folder(owner)
        return WORLDS[cls.family](quota=False, unix_path=folder + "/netmush.sock", address_window=5,
                                  **cls.quirks)

    def test_a_client_that_negotiates_at_once_can_log_in(self):
        """As PuTTY does; telnet in front of the server's first is text on the unix socket."""
        client = self.login(first=command(WILL, NAWS) + naws(100, 40) + command(WILL, TTYPE))
        conn = self.world.online("Alice")[0]
        self.assertEqual((conn.host, conn.size), ("127.0.0.1", client.size))
        client.barrier()

    test_unnegotiating_client_gets_the_bytes_of_a_direct_connection = None     # the twin is TCP
    test_size_changed_during_the_outage_and_during_the_return = None
    test_silent_client_gets_no_telnet_on_return = test_compression_is_refused = None
    test_settings_are_replayed = test_notice_inside_what_is_unfinished = None


class TestTelnetTinyMUX(TelnetFamily, TelnetCase):
    family, knows, offers = "tinymux", (NAWS, TTYPE, CHARSET), True

    @classmethod
    def make_world(cls, owner):
        return RealisticMUX(quota=False)


class TestTelnetRhost(TelnetFamily, TelnetCase):
    family, knows, offers = "rhostmush", (NAWS, TTYPE, CHARSET), True


class TestTelnetTinyMUSH(TelnetFamily, TelnetCase):
    family = "tinymush"
    first = offer((WILL, NAWS), (WILL, TTYPE), (WILL, CHARSET), (DO, SGA),
                  (DO, ECHO)) + naws(132, 43)

    def tearDown(self):
        super().tearDown()
        for conn in self.world.all_connections:
            self.assertNotIn(b"\xff", conn.raw, "the world sees no telnet")

    # telnet of a world that has none does not reach the client
    test_echo_left_on_is_switched_off = None

    def test_has_answers_for_the_world(self):
        alice = self.login(first=self.first)
        alice.wait(lambda c: {offer((DO, NAWS)), offer((DO, TTYPE)), offer((DO, CHARSET)),
                              offer((WONT, SGA)), offer((WONT, ECHO))} <= set(c.commands),
                   "HAS answers")
        alice.send(b"\xff\xf6say x\xff\xffy\r\n" + offer((WILL, 39), (DO, 200)))
        alice.expect(r"\[Yes\]\r\n")
        alice.expect('"xy"')
        alice.wait(lambda c: {offer((DONT, 39)), offer((WONT, 200))} <= set(c.commands),
                   "HAS refuses")

    def test_lines_are_capped(self):
        alice, bob = self.login(first=self.first), self.login("Bob", ())
        for parts in ([b"say " + b"a" * 20000 + b"\r\n"], [b"say ", b"b" * 20000, b"\r\n"],
                      [b"think " + b"c" * 9000, b"c\n"]):
            for part in parts:
                alice.send(part)
                self.read_by_has(bob)
            alice.barrier()
        conn = self.world.online("Alice")[0]
        self.assertLess(max(map(len, re.split(b"[\\r\\n]", conn.raw))), 8001)


FAST = {"beat": 0.2, "hb_timeout": 1}


class TestAcrossFamilies(TelnetCase):
    """Fail-over: each world learns what the one before knew."""

    def move(self, client, old, new):
        old.kill()
        client.expect(re.escape(OFFLINE))
        client.expect(re.escape(ONLINE), 6)
        conn = new.wait(lambda w: w.online("Alice"), what="Alice is in")[0]
        client.barrier()
        return conn

    def chain(self, *families):
        chain = [self.setup_world(family) for family in families]
        has = Has(self, mush_address=", ".join(w.address for w in chain), failover_after=0.2,
                  **FAST).wait_up()
        return chain, has, self.login(has=has, world=chain[0])

    def test_tinymux_rhostmush_teenymush(self):
        (mux, rhost, teeny), has, alice = self.chain("tinymux", "rhostmush", "teenymush")
        mux.wait(lambda w: w.online("Alice")[0].charset, what="charset")
        for _ in range(2):                          # it asks for all three terminal types
            mux.emit("Alice", SEND_TTYPE)
        mux.wait(lambda w: w.online("Alice")[0].ttype == "MTTS 269", what="MTTS")
        conn = self.move(alice, mux, rhost)
        rhost.wait(lambda w: (conn.size, conn.charset,
                              conn.ttype) == ((132, 43), "UTF-8", "TINTIN++"), what="Rhost knows")
        for answer in ("XTERM-256COLOR", "MTTS 269"):
            rhost.emit("Alice", SEND_TTYPE)
            rhost.wait(lambda w: conn.ttype == answer, what=answer)
        alice.barrier()
        self.assertNotIn((DO, EOR), alice.on)       # RhostMUSH offered none
        conn = self.move(alice, rhost, teeny)
        teeny.wait(lambda w: (conn.size, conn.ttype) == ((132, 43), "TINTIN++"), what="Teeny knows")
        alice.wait(lambda c: (DO, SGA) in c.on, "a new offer reached the client")

    def test_all_telnet_is_switched_off_for_tinymush(self):
        (mux, tiny), has, alice = self.chain("tinymux", "tinymush")
        mux.ANSWERS = {**mux.ANSWERS, (DO, ECHO): b""}
        mux.emit("Alice", offer((WILL, ECHO)))
        alice.wait(lambda c: (DO, ECHO) in c.on, "echo is on")
        conn = self.move(alice, mux, tiny)
        self.assertNotIn(b"\xff", conn.raw)
        alice.wait(lambda c: (DO, ECHO) not in c.on, "echo is off")
        alice.barrier()
        self.assertNotIn(b"\xff", conn.raw)


class TestStreams(TelnetCase):
    """Bytes both ways through a running HAS, in one TinyMUX session."""

    def setUp(self):
        self.world = self.setup_world("tinymux")
        self.has = Has(self, mush_address=self.world.address, mush_type="tinymux").wait_up()
        self.alice, self.bob = self.login(agrees=()), self.login("Bob", ())
        self.conn = self.world.online("Alice")[0]
        self.alice.barrier()

    def upward(self, pieces, sync=True):
        """What the world gets of what Alice sends, piece by piece."""
        self.alice.barrier()
        start, end = len(self.conn.raw), b"\r\nsay mark %d\r\n" % next(_marks)
        for piece in pieces:
            self.alice.send(piece)
            if sync:
                self.bob.barrier()
        self.alice.send(end)
        self.world.wait(lambda w: self.conn.raw.endswith(end), what="all has arrived")
        return bytes(self.conn.raw[start:-len(end)])

    def downward(self, pieces):
        """What Alice gets of what the world sends, piece by piece."""
        self.alice.barrier()
        start, end = len(self.alice.raw), b"\r\nmark %d\r\n" % next(_marks)
        for piece in pieces:
            self.world.emit("Alice", piece)
        self.world.emit("Alice", end)
        self.alice.wait(lambda c: c.raw.endswith(end), "all has arrived")
        return self.alice.raw[start:-len(end)]

    @staticmethod
    def is_well_formed(token):
        if token[:2] == b"\xff\xfa":
            return b"\xff" not in token[2:-2].replace(b"\xff\xff", b"")
        return not re.match(rb"\xff(?:[\0-\xef]|\xf7)\Z", token, re.S)

    def test_newline_inside_a_command_in_pieces(self):
        pieces = [b"\xff\xfa\x1f\x00\x84\x00", b"\x0a", b"\xff\xf0"]
        self.assertEqual(self.upward(pieces), b"".join(pieces))
        pieces = [b"\xff\xfa\xc9Core.Hello {\n", b'"a": 1\n', b"}\n", b"\xff", b"\xf0say hi\n",
                  b"\xff\xfb", b"\n"]
        self.assertEqual(self.upward(pieces), b"".join(pieces))

    def test_long_subnegotiations_pass(self):
        body = b"\xff\xfa\xc9" + b"x" * 70000
        pieces = [body, b"abV", b"a\xff", b"\xffb", b"xyU\xff", b"\xffzz\xfa\x1f1234\xff", b"\xf0",
                  b"text"]
        self.assertEqual(self.upward(pieces), b"".join(pieces))
        self.alice.barrier()
        start, self.alice.raw = b"", b""
        for piece in pieces:                        # each arrives before the next is sent
            self.world.emit("Alice", piece)
            start += piece
            self.alice.wait(lambda c: len(c.raw) >= len(start) - 1, f"{piece[:20]!r} arrives")
        self.assertEqual(self.alice.raw, start)

    def test_notice_inside_a_long_subnegotiation(self):
        self.world.emit("Alice", b"\xff\xfa\xc9" + b"x" * 70000)
        self.alice.wait(lambda c: len(c.raw) > 70000, "it passes")
        self.alice.text = self.alice.fresh = b""
        self.world.kill()
        self.alice.expect(re.escape(OFFLINE) + r"\r\n")

    def test_rubbed_out_login_line(self):
        client = closed_after(self, Terminal(self.has.port, ()))
        client.expect("Welcome")
        for byte in b"c\bWHO\r\n":
            client.send(bytes([byte]))
            self.bob.barrier()
        client.expect("logged in")
        self.assertNotRegex(client.raw, rb"=[0-9a-f]{8}")

    def test_fuzz(self):
        for seed in [*range(20), secrets_seed()]:
            with self.subTest(seed=seed):
                rng = random.Random(seed)
                for way in (self.upward, self.downward):
                    stream = b"".join(wild(rng) for _ in range(50)) + b"\xff\xf0\xff\xf0"
                    # what servers read in different ways does not go on (TypedThroughHAS)
                    if way == self.upward:
                        stream = b"".join(filter(self.is_well_formed, tokens(stream)[0]))
                    kept = b"".join(t for t in tokens(stream)[0] if not re.match(
                        rb"\xff[\xfa-\xfe][UVW\x13&.]", t))
                    pieces = list(chop(rng, stream))
                    self.assertEqual(way(pieces, False) if way == self.upward else way(pieces),
                                     kept)
        before = self.has.cpu_seconds()
        self.alice.barrier()
        self.assertRaises(socket.timeout, self.alice._read, time.monotonic() + 0.5)
        self.assertLess(self.has.cpu_seconds() - before, 0.1)


# ---- Bytes, and who the user is

class TestRelay(Case):
    """Bytes go through untouched and at once (rule 1); the original's faults stay mended."""

    def echo_world(self):
        """A world that is a bare socket: the test plays it."""
        listener = closed_after(self, socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(10)
        has = Has(self, mush_address=f"127.0.0.1:{listener.getsockname()[1]}", mush_type="plain")
        self.addCleanup(listener.accept()[0].close)     # the heartbeat's idle connection
        has.wait_up()
        client = closed_after(self, has.client())
        link, _ = listener.accept()
        self.addCleanup(link.close)
        link.settimeout(5)
        return has, client, link

    def receive(self, sock, count):
        data = b""
        while len(data) < count:
            piece = sock.recv(65536)
            self.assertTrue(piece, f"closed after {len(data)} of {count} bytes")
            data += piece
        return data

    def carry(self, blob, source, target):
        sender = threading.Thread(target=source.sendall, args=(blob,))
        sender.start()
        self.assertEqual(self.receive(target, len(blob)), blob)
        sender.join(5)

    def test_a_megabyte_of_any_bytes_each_way(self):
        _, client, link = self.echo_world()
        client.sock.settimeout(5)
        random_bytes = random.Random(4).getrandbits(8 << 17).to_bytes(1 << 17, "big")
        for blob in (random_bytes.replace(b"\xff", b"\xfe"),
                     random_bytes.replace(b"\xff", b"\xff\xff"), b"x" * (1 << 20)):
            self.carry(blob, client.sock, link)
            self.carry(blob, link, client.sock)

    def test_prompts_half_lines_and_telnet_pass_at_once(self):
        _, client, link = self.echo_world()
        for text in (b"Password prompt> ", b"\xff\xf1", b"Ready \xff\xf9", b"x\xff\xfb\x01y",
                     b"half"):
            link.sendall(text)
            self.assertEqual(self.receive(client.sock, len(text)), text)
            client.send(text)
            self.assertEqual(self.receive(link, len(text)), text)

    def test_last_words_before_a_reset_arrive(self):
        _, client, link = self.echo_world()
        link.sendall(b"Going down - Bye\r\n")
        client.send("unread\r\n")
        self.assertTrue(select.select([link], [], [], 5)[0])
        link.close()                            # a reset, since something is unread
        client.expect("Going down - Bye")

    def test_what_a_client_typed_before_it_left_is_carried_out(self):
        _, client, link = self.echo_world()
        client.send("last words\r\n")
        client.sock.shutdown(socket.SHUT_WR)
        self.assertEqual(self.receive(link, 12), b"last words\r\n")
        link.sendall(b"heard\r\n")
        client.expect("heard")
        self.assertEqual(link.recv(10), b"")

    def test_a_client_that_never_reads_disturbs_nobody(self):
        world = self.world("tinymux")
        has = Has(self, script=calm_program(), mush_address=world.address,
                  output_limit=262144).wait_up()
        deaf = self.client(has, "connect Alice alicepw", world, "Alice", receive_buffer=4096)
        other = self.client(has, "connect Bob bobpw", world, "Bob")
        before = has.memory()
        # 22 MB: more than all kernel buffers hold
        for _ in range(200):
            world.emit("Alice", (b"spam " * 15 + b"\r\n") * 1500)
        world.wait(lambda w: not w.online("Alice")[0].out, 20, "HAS drains the deaf client's link")
        other.barrier()
        self.assertLess(has.memory() - before, 4000)
        deaf.skip(rb"<output lost: \d+ lines>")
        deaf.send("say done\r\n").skip(rb"You say, .done")

    def test_idle_costs_nothing_up_or_down(self):
        world = self.world("tinymux")
        has = Has(self, mush_address=world.address, beat=10, retry=1).wait_up()
        client = self.client(has, "connect Alice alicepw", world, "Alice")
        half = self.client(has)
        half.sock.shutdown(socket.SHUT_WR)
        for change in (lambda: None, lambda: world.kill() or client.expect(re.escape(OFFLINE))):
            change()
            begin, cpu = time.monotonic(), has.cpu_seconds()
            with self.assertRaisesRegex(AssertionError, "^no "):
                # waiting for what cannot come is the pause
                client.expect("never sent", 1.5)
            self.assertLess((has.cpu_seconds() - cpu) / (time.monotonic() - begin), 0.05)

    def test_a_forged_heartbeat_answer_changes_nothing(self):
        world = self.world("teenymush", shutdown_delay=0.3)
        has = Has(self, mush_address=world.address, beat=0.1).wait_up()
        alice, bob = (self.client(has, f"connect {n} {n.lower()}pw", world, n)
                      for n in ("Alice", "Bob"))
        for text in ("### PING ###", "=0123456789ab=", "1"):
            bob.send(f"@pemit *heartbeat={text}\r\n")
        bob.barrier()
        restart(world, alice, bob)


class TestAddress(Case):
    """The world learns who a user is, and nobody can lie about it (rule 9)."""

    def test_rhostmush_that_greets_only_whose_address_it_knows(self):
        world = self.world("rhostmush", silent_banner=True)
        has = Has(self, mush_address=world.address).wait_up()
        newcomer = self.client(has)
        newcomer.expect("Welcome to RhostMUSH")
        newcomer.send("connect Alice alicepw\r\n")
        world.wait(lambda w: w.online("Alice"), what="Alice is in")
        self.assertEqual(world.online("Alice")[0].address_given, "127.0.0.1")
        self.assertNotIn(b"WARNING 127", has.log)

    def test_rhostmush_that_hangs_up_on_the_address_line(self):
        for words, quirks, settings in (
                (b"SSL Connections are not allowed from your site.", {"trusted_address": False},
                 {}),
                (b"SSL attempt to negotiate without SSL enabled.",
                 {"proxy_enabled": False, "sconnect_cmd": "SESAME"},
                 {"remotehostname_cmd": "SESAME"})):
            with self.subTest(words):
                world = self.world("rhostmush", **quirks)
                has = Has(self, mush_address=world.address, **settings).wait_up()
                world.wait(lambda w: w.online("heartbeat"), what="heartbeat")
                warning = rb"WARNING .*hangs up on the line that hands over addresses.*"
                warning += re.escape(words)
                has.wait_log(warning)
                alice = self.client(has, "connect Alice alicepw", world, "Alice")
                restart(world, alice)
                alice.barrier()
                newcomer = self.client(has)
                newcomer.expect("Welcome to RhostMUSH")
                self.assertEqual(len(re.findall(warning, has.log)), 1)
                told = [line for _, line in world.lines if line.startswith((b"PROXY", b"SESAME"))]
                self.assertEqual(len(told), 1)

    def test_teenymush_keeps_address_and_time_over_a_return(self):
        world = self.world("teenymush")
        has = Has(self, mush_address=world.address).wait_up()
        alice = self.client(has, "connect Alice alicepw", world, "Alice")
        first = world.online("Alice")[0].address_given
        self.assertEqual(first[0], "127.0.0.1")
        self.assertLess(abs(int(first[1]) - time.time()), 60)
        restart(world, alice)
        self.assertEqual(world.online("Alice")[0].address_given, first)

    def test_the_word_cannot_be_typed(self):
        for family, word in (("teenymush", b"@remotehostname 6.6.6.6=1"),
                             ("rhostmush", b"PROXY TCP4 6.6.6.6 1 2 3")):
            for settings in ({}, {"remotehostname_cmd": "none"}):
                with self.subTest(family, **settings):
                    world = self.world(family)
                    has = Has(self, mush_address=world.address, **settings).wait_up()
                    before = len(world.lines)
                    client = self.client(has)
                    for forged in (word, word.upper() if b"@" in word else word, word[:3] + b"\0" +
                                   word[3:], b"  " + word, word[:2] + b"\xff\xf1" + word[2:],
                                   word[:4] + b"\r" + word[4:], b"x\b" + word):
                        for byte in forged + b"\r\n":
                            client.send(bytes([byte]))
                    client.send("connect Alice alicepw\r\n")
                    world.wait(lambda w: w.online("Alice"), what="Alice is in")
                    self.assertFalse(
                        [line for _, line in world.lines[before:] if b"6.6.6.6" in line])
                    self.assertFalse(world.forged)
                    if family == "rhostmush":
                        client.barrier()
                        client.send(b"LOGOUT\r\n" + word + b"\r\nconnect Bob bobpw\r\n")
                        world.wait(lambda w: w.online("Bob"), what="Bob is in")
                        self.assertTrue(world.proxy_enabled)
                        self.assertFalse(world.forged)

    def test_pennmush_by_its_unix_socket(self):
        folder = new_folder(self)
        world = self.world("pennmush", silent_start=0.1, unix_path=folder + "/netmush.sock",
                           address_window=5)
        has = Has(self, mush_address=world.address, proxy_from="127.0.0.1").wait_up()
        client = closed_after(self, has.client())
        client.send("PROXY TCP6 2001:db8::7 ::1 4000 4201\r\nconnect Alice alicepw\r\n")
        world.wait(lambda w: w.online("Alice"), what="Alice is in")
        self.assertEqual(world.online("Alice")[0].address_given[0], "2001:db8::7")

    def test_the_scripted_pennmush_takes_an_address_only_at_once(self):
        """As the real one, within 0.1 s; 5 s in other tests, where a busy machine must not decide.
        """
        folder = new_folder(self)
        for window, host, heard in ((5, "h", [b"WHO"]), (-1, "(Unknown)", [b"1.2.3.4^h", b"WHO"])):
            world = self.world("pennmush", unix_path=f"{folder}/{window}.sock",
                               address_window=window)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(world.unix_path)
                sock.sendall(b"1.2.3.4^h\r\nWHO\r\n")
                world.wait(lambda w: w.lines[-1:] and w.lines[-1][1] == b"WHO", what="WHO is read")
            self.assertEqual((world.all_connections[0].host, world.all_connections[0].lines),
                             (host, heard))

    def test_proxy_lines_are_believed_from_proxy_from_only(self):
        world = self.world("rhostmush")
        has = Has(self, mush_address=world.address, proxy_from="127.0.0.1").wait_up()
        told = self.client(has, "PROXY TCP4 203.0.113.9 10.0.0.1 1 2\r\nconnect Alice alicepw",
                           world, "Alice")
        self.assertEqual(world.online("Alice")[0].address_given, "203.0.113.9")
        silent = self.client(has)
        # no PROXY line within a second: a client like any other
        silent.expect("(?i)connect", 5)
        bad = self.client(has, "connect Bob bobpw", world, "Bob")
        self.assertEqual(world.online("Bob")[0].address_given, "127.0.0.1")
        for client in (told, bad):
            client.barrier()


# ======================================================================
# The program
#
# Command line, log, control socket, TLS, upgrades.
# ======================================================================

class TestProgram(Case):
    """Command line, log, signals, control socket."""

    def shell(self, arguments, before="", **more):
        """has.py run by a shell that has done something before."""
        return subprocess.run(
            ["sh", "-c", f"{before}exec {sys.executable} {calm_program()} {arguments}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=20,
            **more)

    def test_wrong_settings_end_it_with_status_2_and_all_reasons(self):
        folder = new_folder(self)
        conf = os.path.join(folder, "has.conf")
        write_text(conf, "beet = 5\nlocal_port = many\nmush_type = mushy\n")
        for arguments in (("--check",), ()):
            done = run_main("--config", conf, *arguments)
            self.assertEqual(done.returncode, 2)
            for text in ("has.conf:1: beet: no such setting; did you mean beat?",
                         "has.conf:2: local_port = many", "has.conf:3: mush_type = mushy",
                         "3 wrong in the settings"):
                self.assertIn(text, done.stderr)

    def test_port_taken(self):
        """It says so, and leaves no dead control socket."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            folder = new_folder(self)
            conf = os.path.join(folder, "has.conf")
            with open(conf, "w") as file:
                file.write(
                    f"local_address = 127.0.0.1\nlocal_port = {taken.getsockname()[1]}\n"
                    "local_port_ssl = 0\nlog_file =\n")
            done, port = run_failing("--config", conf), taken.getsockname()[1]
        self.assertEqual((done.returncode, os.listdir(folder)), (1, ["has.conf"]))
        self.assertIn(f"cannot start: 127.0.0.1, local_port {port}: Address already in use: "
                      "another program has this port", done.stderr)

    def test_what_cannot_start_says_so_where_it_was_started(self):
        has = Has(self, mush_address="127.0.0.1:1").wait_down()
        log_file = os.path.join(has.folder, "has.log")
        has.configure(log_file=log_file)
        done = run_failing("--config", has.conf)            # a second HAS on the same has.conf
        self.assertEqual((done.returncode, done.stderr.splitlines()), (1, [
            f"has.py: cannot start: {has.conf[:-5]}.sock: "
            "another HAS is running with this has.conf"]))

    def test_check_tries_what_a_start_needs(self):
        has = Has(self, mush_address="127.0.0.1:1").wait_down()
        usual = dict(log_file="", control_socket="", local_address="127.0.0.1")
        for settings, text in ((dict(log_file="/nonexistent/has.log"),
                                "log_file = /nonexistent/has.log: cannot be written"),
                               (dict(log_file="/tmp"), "log_file = /tmp: is a folder"),
                               (dict(control_socket="/nonexistent/x"),
                                "control_socket = /nonexistent/x: cannot be made: make the folder"),
                               (dict(control_socket="/tmp"), "control_socket = /tmp: there is a "
                                                             "file that is no socket"),
                               (dict(control_socket=f"/tmp/{'x' * 200}"), "a path of more than"),
                               (dict(local_address="192.0.2.1"), "local_address = 192.0.2.1: ")):
            has.configure(**{**usual, **settings})
            done = has.ask("--check")
            self.assertEqual(done.returncode, 2)
            self.assertIn(text, done.stdout)
        has.configure(**usual)
        self.assertEqual(has.ask("--check").returncode, 0)

    def test_a_file_at_the_control_socket_s_path_is_left_alone(self):
        folder = new_folder(self)
        path = os.path.join(folder, "players.log")
        write_text(path, "precious\n")
        control = has.Control(None)
        with self.assertLogs(has.log, "WARNING") as said:
            control.open(path)
        self.assertIn(f"no control socket at {path} (there is a file that is no socket)",
                      said.output[0])
        with open(path) as file:
            self.assertEqual((file.read(), control.listener), ("precious\n", None))

    def test_a_control_socket_that_was_deleted_comes_back(self):
        rig = closed_after(self, Rig())
        folder = new_folder(self)
        path = folder + "/has.sock"
        control = has.ControlListener(rig.hub, path)
        for _ in range(2):
            os.unlink(path)
            with self.assertLogs(has.log, "WARNING") as logged:
                rig.pass_time(5.1)
            self.assertIn("made anew", logged.output[0])
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(path)
        os.unlink(path)
        write_text(path, "precious")
        with self.assertLogs(has.log, "WARNING") as logged:
            rig.pass_time(*[5.1] * 3)
        self.assertEqual(len(logged.output), 1)
        control.close()
        self.assertEqual(read_text(path), "precious")

    def test_a_has_conf_that_was_emptied_or_has_gone_is_refused(self):
        has = Has(self, mush_address="127.0.0.1:1").wait_down()
        for spoil in (lambda: open(has.conf, "w").close(), lambda: os.unlink(has.conf)):
            after = len(has.log)
            spoil()
            has.signal(signal.SIGHUP)
            has.wait_log(
                rb"sets nothing any more, or is not there(?s:.*)the old settings stay in force", 10,
                after)
        has.configure()
        has.signal(signal.SIGHUP)
        has.wait_log(rb"HUP: settings read")

    def test_odd_surroundings(self):
        """An ASCII locale, closed outputs, few descriptors: no traceback, and a status that can be
        relied on.
        """
        has = Has(self, mush_address="127.0.0.1:1", offline_notice="caf\u00e9").wait_down()
        environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0",
                       "PYTHONCOERCECLOCALE": "0"}
        for request, status in (("--status", 1), ("--notice caf\u00e9", 0)):
            done = self.shell(f"--config {has.conf} {request}", env=environment)
            self.assertEqual((done.returncode, done.stderr), (status, ""))
        for redirection in (">&-", ">&- 2>&-", ">/dev/full"):
            done = self.shell(f"--config {has.conf} --status {redirection}")
            self.assertNotIn("Traceback", done.stderr, redirection)
            self.assertEqual(done.returncode, 1)
        done = self.shell(f"--config {has.conf} --status", "ulimit -n 8; ")
        self.assertNotIn("Traceback", done.stderr)

    def test_the_terminal_stops_nobody(self):
        has = Has(self, mush_address="127.0.0.1:1").wait_down()
        for number in (signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN):
            has.signal(number)
        has.wait_log(rb"Ctrl-Z \(TSTP\): not obeyed")
        has.signal(signal.SIGUSR1)
        has.wait_log(rb"is down for")

    def test_wrong_arguments_end_it_with_status_2(self):
        for arguments, text in ((("--probe",), "--probe goes with --check"),
                                (("--json",), "--json goes with --status or --history"),
                                (("--prometheus", "--history"), "--prometheus goes with --status"),
                                (("--config", "/nonexistent/has.conf"), "there is no such file"),
                                (("--config", "", "--stop"), "there is no such file"),
                                (("--notice", " "), "say something"),
                                (("--maintenance", ""), "say something"),
                                (("--to", "Alice", "--status"), "--to goes with --notice"),
                                (("--deny", "10.0.0.1", "--for", "1y"), "invalid span of time"),
                                (("--for", "1h", "--kick", "x"), "--for goes with --deny"),
                                (("--reason", "x", "--stop"), "--reason goes with --kick"),
                                (("--kick", "x", "--stop"), "not allowed with argument")):
            done = run_main(*arguments)
            self.assertEqual(done.returncode, 2)
            self.assertIn(text, done.stderr)

    @unittest.skipUnless(os.path.exists("/proc/self/status"),
                         "only Linux says how large the table is")
    def test_the_table_of_descriptors_has_room_from_the_start(self):
        for most, room in ((300, 650), (10, 64), (0, min(20000, has.files_allowed(1)))):
            running = Has(self, mush_address="127.0.0.1:1", max_clients=most).wait_down()
            with open(f"/proc/{running.process.pid}/status") as status:
                size = int(re.search(r"FDSize:\s*(\d+)", status.read()).group(1))
            self.assertGreaterEqual(size, room)
            self.assertLess(len(os.listdir(f"/proc/{running.process.pid}/fd")), 40)

    def test_term_and_int_say_goodbye(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            world = self.world("tinymux")
            has = Has(self, mush_address=world.address).wait_up()
            client = self.client(has, "connect Alice alicepw", world, "Alice")
            has.signal(number)
            self.assertIn(b"Goodbye", client.expect_end())
            self.assertEqual(has.process.wait(5), 0)
            has.wait_log(rb"INFO stopped\n")

    def test_systemd_is_told_when_it_serves(self):
        folder = new_folder(self)
        for path in (folder + "/notify", "@" + folder)[:2 if sys.platform == "linux" else 1]:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
                systemd.bind(path.replace("@", "\0"))
                systemd.settimeout(5)
                with mock.patch.dict(os.environ, NOTIFY_SOCKET=path):
                    has = Has(self, mush_address="127.0.0.1:1")
                self.assertEqual(systemd.recv(100), b"READY=1")
                has.client().close()

    def test_the_control_socket_of_a_has_that_died_is_replaced(self):
        dead = Has(self, mush_address="127.0.0.1:1")
        dead.faults = True                      # it does not obey TERM any more
        dead.process.kill()
        dead.process.wait(5)
        path = dead.conf[:-5] + ".sock"
        self.assertTrue(os.path.exists(path))
        has = Has(self, mush_address="127.0.0.1:1", control_socket=path)
        has.wait_log(rb"is down")
        self.assertEqual(has.ask("--status").returncode, 1)
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)

    def test_control_socket(self):
        world = self.world("tinymux")
        has = Has(self, mush_address=world.address, beat=0.1, admins="alice").wait_up()
        alice, bob = (self.client(has, f"connect {n} {n.lower()}pw", world, n)
                      for n in ("Alice", "Bob"))
        bob.send("#?\r\n").barrier()
        self.assertNotIn(b"heartbeat:", bob.seen)
        alice.send("#?\r\n").expect("heartbeat: .*")
        alice.expect("Alice .* PLAYING")
        self.assertEqual(os.stat(has.conf[:-5] + ".sock").st_mode & 0o777, 0o600)
        done = self.shell(f"--config {has.conf} --status --json")
        status = json.loads(done.stdout)
        self.assertEqual((done.returncode, status["world"]["health"],
                          [s["name"] for s in status["sessions"]]), (0, "up", ["Alice", "Bob"]))
        self.assertEqual(has.ask("--notice", "Cake \x1b[2J at nine").returncode, 0)
        for client in (alice, bob):
            client.expect(r"Cake \?\[2J at nine\r\n")
        self.assertEqual(has.ask("--notice", "Only you", "--to", "Bob").stdout, "told 1 user\n")
        bob.expect("Only you\r\n")
        self.assertEqual(has.ask("--notice", "Only you", "--to", "Carol").returncode, 2)
        self.assertEqual(has.ask("--maintenance", "Back at six").returncode, 0)
        number = next(s["id"] for s in status["sessions"] if s["name"] == "Bob")
        done = has.ask("--kick", str(number), "--reason", "No spam, please")
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"administrator.\r\n# NOTICE # Reason: No spam, please\r\n", bob.expect_end())
        for who in ("999", "Carol"):
            self.assertEqual(has.ask("--kick", who).returncode, 2)
        done = has.ask("--deny", "10.0.0.0/8", "--for", "1h")
        self.assertEqual((done.returncode, done.stdout), (
            0, "nobody comes in from 10.0.0.0/8 for 1h 0m; closed: 0 users\n"))
        self.assertEqual(has.ask("--deny", "10.0.0.0/8", "--for", "0").returncode, 0)
        done = has.ask("--deny", "10.0.0.0/8", "--for", "0")
        self.assertEqual((done.returncode, done.stderr), (
            2, "has.py: 10.0.0.0/8 is not denied by --deny: see --status\n"))
        self.assertEqual(has.ask("--deny", "10.0.0.1/8").returncode, 2)
        with socket.socket(socket.AF_UNIX) as garbage:
            garbage.connect(has.conf[:-5] + ".sock")
            garbage.sendall(b"[1]\n")
            self.assertIn(b"bad request", garbage.recv(1000))
        world.kill()
        alice.expect(re.escape(OFFLINE + "\r\n# NOTICE # Back at six\r\n"))
        self.assertEqual(has.ask("--status").returncode, 1)
        done = has.ask("--status", "--prometheus")
        self.assertEqual(done.returncode, 1)
        self.assertIn(f'has_world_up{{world="{world.address}"}} 0\n', done.stdout)
        done = has.ask("--history")
        self.assertRegex(done.stdout, r"until now +1 +0  - .*\n    still waiting: Alice\n\Z")
        self.assertEqual(json.loads(has.ask("--history", "--json").stdout)["waiting"], ["Alice"])
        has.signal(signal.SIGUSR1)
        has.wait_log(rb"outages: 1")
        # a second HAS on the same has.conf
        self.assertEqual(run_failing("--config", has.conf).returncode, 1)
        has.stop()
        self.assertEqual(has.ask("--status").returncode, 3)

    def test_reload_says_what_came_of_it(self):
        running = Has(self, mush_address="127.0.0.1:1").wait_down()

        def reload(**settings):
            running.configure(**settings)
            done = running.ask("--reload")
            return done.returncode, done.stdout, done.stderr
        status, said, wrong = reload(beat=7)
        self.assertEqual((status, wrong), (0, ""))
        self.assertRegex(said, r"overrides the constants (?s:.*)\nsettings read\n\Z")
        status, said, wrong = reload(beat="often", max_clients="many")
        self.assertEqual((status, said), (2, ""))
        for text in ("beat = often: is not a number", "max_clients = many",
                     "the old settings stay in force"):
            self.assertIn(text, wrong)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            status, _, wrong = reload(beat=7, max_clients=0, local_port=port)
        self.assertEqual(status, 1)
        self.assertIn(f"cannot listen on 127.0.0.1, local_port {port}: Address already", wrong)
        status, _, wrong = reload(local_port=0, log_file="/nonexistent/has.log")
        self.assertEqual(status, 1)
        self.assertIn("cannot open log_file /nonexistent/has.log", wrong)
        status, said, _ = reload(log_file="", mush_address="127.0.0.1:2",
                                 control_socket=running.conf[:-5] + ".sock")
        self.assertEqual(status, 0)
        self.assertIn("mush_address is now 127.0.0.1:2; users move when it is confirmed", said)
        self.assertIn("control_socket takes effect at the next start only", said)

    def test_stop_says_who_was_on_and_waits_for_the_end(self):
        world = self.world("tinymux")
        running = Has(self, mush_address=world.address).wait_up()
        alice = self.client(running, "connect Alice alicepw", world, "Alice")
        lurker = running.client()
        lurker.expect("Welcome")
        done = running.ask("--stop")
        self.assertEqual((done.returncode, done.stdout.splitlines()), (0, [
            "saying goodbye to 2 users: Alice, 1 without a login", "stopped"]))
        self.assertEqual(running.process.wait(2), 0)        # it was gone, or as good as
        self.assertIn(b"Goodbye", alice.expect_end())
        for order in ("--stop", "--reload", "--upgrade"):
            done = running.ask(order)
            self.assertEqual((done.returncode, done.stdout), (3, ""))

    def test_who_has_said_goodbye_is_not_replaced(self):
        """A TERM during the rehearsal: its end, or a fault, must not bring HAS back."""
        rig = closed_after(self, Rig())
        upgrade = has.Upgrade(has.Survival(rig.hub, mock.Mock()), HAS, [])
        rig.hub.stop()
        with self.assertLogs(has.log, "ERROR") as logged:
            upgrade._on_rehearsed("")
            upgrade.leave()
            upgrade.rescue()
        self.assertEqual([line.partition(":has:")[2] for line in logged.output],
                         ["HAS is being stopped, so it is not replaced any more"] * 2)
        self.assertEqual(upgrade.vault.mock_calls, [])

    def test_who_asks_may_leave_and_an_older_has_may_not_know(self):
        rig = closed_after(self, Rig())
        with self.assertLogs(has.log, "ERROR"):
            upgrade = has.Upgrade(has.Survival(rig.hub, mock.Mock()), "/nonexistent/has.py", "")
            rig.hub.control.upgrade = upgrade.begin
            for request, pattern in (
                    (b'{"do": "upgrade"}', "rehearsal could not be started: .*has.py"),
                    (b'{"do": "dance"}', "unknown request 'dance': the HAS that runs is older"),
                    (b'[1]', "bad request")):
                ours, theirs = socket.socketpair()
                self.addCleanup(ours.close)
                has.Caller(rig.hub, theirs)
                ours.sendall(request + b"\n")
                rig.settle()
                self.assertRegex(json.loads(ours.recv(4096))["error"], pattern)
                self.assertEqual(ours.recv(1), b"")
        told = []
        rig.hub.control.upgrade = told.append               # the outcome comes later
        ours, theirs = socket.socketpair()
        has.Caller(rig.hub, theirs)
        ours.sendall(b'{"do": "upgrade"}\n')
        rig.settle()
        rig.pass_time(11, 30)                               # it waits on
        ours.setblocking(False)
        self.assertRaises(BlockingIOError, ours.recv, 1)
        ours.close()
        rig.settle()
        told[0]({"done": "too late"})

    def test_a_terminal_that_nobody_reads_stops_nobody(self):
        world = self.world("tinymux")
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        has = Has(self, mush_address=world.address).wait_up()
        port = free_port()
        has.configure(local_port=port, log_level="debug", control_socket=has.folder + "/other.sock")
        process = subprocess.Popen([sys.executable, calm_program(), "--config", has.conf],
                                   stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        started = b""
        while b"listening on" not in started:
            started += os.read(master, 1000)
        clients = []
        for _ in range(300):                    # far more log than a terminal holds
            client = Client(port)
            client.close()
            clients.append(client)
        last = closed_after(self, Client(port))
        last.log_in(world)
        process.terminate()
        self.assertEqual(process.wait(6), 0)

    def test_the_password_is_nowhere(self):
        world = self.world(
            "tinymux", players={"heartbeat": "hbs3cret", "Alice": "s3cretpw", "Bob": "bobpw"})
        has = Has(self, script=calm_program(), mush_address=world.address,
                  hb_pass="hbs3cret").wait_up()
        alice = self.client(has, "connect Alice s3cretpw", world, "Alice")
        alice.send("@password s3cretpw=news3cret\r\n").expect("changed")
        world.kill()
        alice.expect(re.escape(OFFLINE))
        alice.send("connect Alice s3cretpw\r\n").expect("when the world returns")
        world.start()
        alice.expect(re.escape(ONLINE))
        for number in (signal.SIGUSR1, signal.SIGHUP):
            has.signal(number)
        has.wait_log(b"HUP: settings read")
        pid = has.process.pid
        shown = has.log + has.ask("--status", "--json").stdout.encode()
        for name in ("cmdline", "environ"):
            with open(f"/proc/{pid}/{name}", "rb") as file:
                shown += file.read()
        self.assertNotIn(b"s3cret", shown)
        with open(f"/proc/{pid}/limits") as file:
            self.assertRegex(file.read(), r"Max core file size\s+0\s+0")

    def test_log_file_is_opened_anew_at_hup(self):
        world = self.world("tinymux")
        has = Has(self, mush_address=world.address).wait_up()
        path = os.path.join(has.folder, "has.log")
        has.configure(log_file=path)
        has.signal(signal.SIGHUP)
        world.wait(lambda w: os.path.exists(path) and "HUP: settings read" in read_text(path),
                   what="the log file")
        os.rename(path, path + ".1")
        has.signal(signal.SIGHUP)
        world.wait(lambda w: os.path.exists(path) and "HUP: settings read" in read_text(path),
                   what="a new log file")
        os.rename(path, path + ".2")
        has.configure(beat="often")             # logrotate waits for nobody's typing error
        has.signal(signal.SIGHUP)
        world.wait(lambda w: os.path.exists(path) and "the old settings stay" in read_text(path),
                   what="another log file")
        self.assertEqual(has.ask("--status").returncode, 0)


class TestTLS(Case):
    def setUp(self):
        self.folder = new_folder(self)
        self.cert, self.key = certificate(self.folder)
        self.mush = self.world("tinymux")
        self.has = Has(self, mush_address=self.mush.address, local_port=free_port(),
                       local_port_ssl=free_port(), ssl_cert=self.cert, ssl_key=self.key).wait_up()
        self.port = int(self.has.settings["local_port_ssl"])

    def test_tls_clients_ride_through_a_crash(self):
        client = closed_after(self, TLSClient(self.port))
        client.log_in(self.mush)
        self.mush.emit("Alice", b"big " * 100000 + b"\r\n")
        client.expect(rb"(?:big ){100000}\r\n")
        restart(self.mush, client)
        client.send("QUIT\r\n")
        self.assertIn(b"Disconnected", client.expect_end())

    def test_every_end_of_ours_is_a_close_notify(self):
        """Without it Python's ssl raises SSLEOFError here: an end and a cut look the same."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        for end in (lambda sock: sock.sendall(b"QUIT\r\n"),
                    lambda sock: socket.socket.shutdown(sock, socket.SHUT_WR)):
            with context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 5),
                                     suppress_ragged_eofs=False) as sock:
                self.assertTrue(sock.recv(4096))
                end(sock)
                while sock.recv(4096):
                    pass

    def test_why_a_certificate_is_not_believed_is_said(self):
        mistrusted = has.world_context(True, "", {})
        plain = closed_after(self, socket.create_connection(("127.0.0.1", self.port), 5))
        with self.assertRaises(OSError) as caught:
            mistrusted.wrap_socket(plain, server_hostname="localhost")
        self.assertRegex(has.tls_reason(caught.exception),
                         "CERTIFICATE_VERIFY_FAILED: self[- ]signed certificate$")

    def test_a_named_ca_is_not_held_to_what_python_3_13_is_strict_about(self):
        made = ssl.create_default_context

        def strict(*arguments, **more):
            context = made(*arguments, **more)
            context.verify_flags |= ssl.VERIFY_X509_STRICT
            return context
        with mock.patch("ssl.create_default_context", strict):
            for named in ("", self.cert):
                flags = has.world_context(True, named, {}).verify_flags
                self.assertEqual(bool(flags & ssl.VERIFY_X509_STRICT), not named)

    def test_silent_and_broken_handshakes_disturb_nobody(self):
        silent = [Client(self.port) for _ in range(20)]
        plain = Client(self.port).send("connect Alice alicepw\r\n")
        plain.expect_end()
        self.has.wait_log(rb"left before it was let in: TLS handshake failed")
        client = closed_after(self, TLSClient(self.port))
        client.expect("Welcome")
        for one in silent + [plain]:
            one.close()
        self.assertNotIn(b"session 2", self.has.log)

    def test_certificates_are_read_again_at_hup(self):
        first = ssl.get_server_certificate(("127.0.0.1", self.port))
        certificate(self.folder)
        self.has.signal(signal.SIGHUP)
        self.has.wait_log(rb"HUP: settings read")
        self.assertNotEqual(ssl.get_server_certificate(("127.0.0.1", self.port)), first)
        write_text(self.key, "broken\n")
        second = ssl.get_server_certificate(("127.0.0.1", self.port))
        self.has.signal(signal.SIGHUP)
        self.has.wait_log(rb"no usable pair(?s:.*)old settings stay")
        self.assertEqual(ssl.get_server_certificate(("127.0.0.1", self.port)), second)

    def says_its_last_words(self, outer):
        """A client that half-closes is answered: nothing comes as ciphertext, nothing is lost."""
        client = closed_after(self, outer.client())
        client.log_in(self.mush, "Bob", "bobpw")
        client.send("say last words\r\n")
        client.sock.shutdown(socket.SHUT_WR)
        self.assertIn(b'"last words"', client.expect_end())

    def test_tls_to_the_world(self):
        """Another HAS with a TLS port is a fine world that speaks TLS."""
        outer = Has(self, mush_address=f"localhost:{self.port}", mush_ssl="yes",
                    mush_ssl_ca=self.cert, mush_type="tinymux").wait_up()
        client = closed_after(self, outer.client())
        client.log_in(self.mush)
        client.send("QUIT\r\n").expect_end()
        for _ in range(5):
            self.says_its_last_words(outer)
        distrustful = Has(self, mush_address=f"localhost:{self.port}", mush_ssl="yes",
                          mush_type="tinymux")
        distrustful.wait_log(rb"cannot be reached: TLS: CERTIFICATE_VERIFY_FAILED")


class TestTLSUnverified(Case):
    def test_a_world_whose_certificate_nobody_knows(self):
        """Another HAS with a TLS port is that world."""
        with tempfile.TemporaryDirectory() as folder:
            cert, key = certificate(folder)
            world, port = self.world(), free_port()
            Has(self, mush_address=world.address, local_port_ssl=port, ssl_cert=cert,
                ssl_key=key).wait_up()
            has = Has(self, mush_address=f"127.0.0.1:{port}", mush_type="tinymux", mush_ssl="yes",
                      mush_ssl_verify="no")
            self.client(has.wait_up(), "connect Alice alicepw", world, "Alice")


# has.py of before the rehearsal had to prove anything, and the last one of before the vault
OLD_PROGRAMS = "92354d5", "cd16300"


@functools.lru_cache(None)
def old_program(commit):
    """A has.py of before, from git; None where that cannot be had."""
    done = subprocess.run(["git", "-C", HERE, "show", f"{commit}:has.py"], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) if shutil.which("git") else None
    return done.stdout if done and done.returncode == 0 else None


class TestUpgrade(Case):
    """USR2: another program in the same process, and nobody notices."""

    def setUp(self):
        self.folder = new_folder(self, prefix="has-upgrade-")
        self.script = shutil.copy(HAS, self.folder)
        self.mush = self.world()
        self.mush.quota = None

    def start(self, python=sys.executable, fresh=False, **settings):
        """HAS, whose upgrades come from `script`; `fresh`: that is also what is started, in a fresh
        interpreter.
        """
        arguments = dict(script=self.script) if fresh else dict(arguments=("--script", self.script))
        self.has = Has(self, python, mush_address=self.mush.address, beat=0.3, **arguments,
                       **settings).wait_up()
        self.pid = self.has.process.pid

    def player(self, name, password, tls=False):
        client = closed_after(self, TLSClient(self.tls_port) if tls else self.has.client())
        client.send(f"connect {name} {password}\r\n")
        self.mush.wait(lambda w: w.online(name), what=f"{name} is in")
        client.barrier()
        return client

    def edit(self, old, new):
        with open(self.script) as file:
            text = file.read()
        self.assertIn(old, text)
        write_text(self.script, text.replace(old, new, 1))

    def upgrade(self, expect=rb"goes on where"):
        after = len(self.has.log)
        self.has.signal(signal.SIGUSR2)
        self.has.wait_log(expect, 20, after)
        self.assertEqual(self.has.process.pid, self.pid)

    def test_plain_and_tls_users_notice_nothing(self, *python):
        self.start_with_tls(*python)
        plain, tls = self.player("Alice", "alicepw"), self.player("Bob", "bobpw", tls=True)
        lurker = closed_after(self, self.has.client())
        lurker.expect("Welcome")
        plain.send("say half")
        self.upgrade()
        plain.send("-line\r\n").expect('You say, "half-line"')
        plain.barrier(), tls.barrier()
        self.assertEqual(len(self.mush.logins), 3)      # heartbeat, Alice, Bob: once each
        for client in (plain, tls, lurker):
            self.assertNotIn(b"NOTICE", client.seen)
        lurker.log_in(self.mush, "Carol", "carolpw")
        self.mush.kill()
        for client in (plain, tls, lurker):
            client.expect(re.escape(OFFLINE))
        self.upgrade()
        plain.send("say x\r\n").expect(re.escape(UNSENT))
        self.mush.start()
        for client in (plain, tls, lurker):
            client.expect(re.escape(ONLINE))
            client.barrier()
        tls.send("QUIT\r\n").expect_end()
        self.mush.boot("Alice")
        plain.expect_end()

    def order(self):
        """--upgrade, by the program that was started: (exit status, output, errors)."""
        done = self.has.ask("--upgrade")
        return done.returncode, done.stdout, done.stderr

    def test_the_order_waits_for_the_outcome(self):
        self.start()
        client = self.player("Alice", "alicepw")
        self.edit('VERSION = "', 'VERSION = "9.')
        status, said, wrong = self.order()
        self.assertRegex(said, rf"\Apid {self.pid}: HAS {has.VERSION} became 9\.{has.VERSION}, "
                         r"1 of 1 sessions go on\n\Z")
        self.assertEqual((status, wrong), (0, ""))
        self.edit("import argparse\n", "import argparse\nthis is no Python\n")
        status, said, wrong = self.order()
        self.assertEqual((status, said), (1, ""))
        self.assertRegex(wrong, r"failed its rehearsal \(status 1\. It said:\): HAS goes on as it "
                         r"is\n(?s:.*)SyntaxError")
        self.edit("this is no Python\n", "")
        self.has.faults = True                  # the planted one
        self.edit("        hub.record.taken_over(", "        if not options.rehearse:\n"
                  "            raise ValueError('no')\n        hub.record.taken_over(")
        status, said, wrong = self.order()
        self.assertIn("could not take over (see the log): the old one goes on", wrong)
        self.assertRegex(said, rf"pid {self.pid}: .* 1 of 1 sessions go on")
        self.assertEqual(status, 1)
        client.barrier()

    def test_every_line_typed_during_upgrades_is_answered_once(self):
        self.start_with_tls()
        clients = [self.player("Alice", "alicepw"), self.player("Bob", "bobpw", tls=True)]
        stop, change = threading.Event(), threading.Condition()
        sent, answered, wrong = [0, 0], [0, 0], []

        def type_on(which):
            try:
                while not stop.is_set():
                    sent[which] += 1
                    clients[which].send(f"think number {sent[which]}.\r\n")
                    clients[which].expect(rf"number {sent[which]}\.\r\n")
                    with change:
                        answered[which] = sent[which]
                        change.notify_all()
            except Exception:
                with change:
                    wrong.append(traceback.format_exc())
                    change.notify_all()

        def go_on():
            """Each is answered a line that it typed after now."""
            with change:
                last = list(sent)
                change.wait_for(lambda: wrong or all(map(operator.gt, answered, last)), 10)
                self.assertEqual(wrong, [])
                self.assertTrue(all(map(operator.gt, answered, last)),
                                f"{answered} answered, {last} typed before")
        threads = [threading.Thread(target=type_on, args=(n,)) for n in (0, 1)]
        for thread in threads:
            thread.start()
        self.addCleanup(stop.set)
        go_on()
        for _ in range(2):
            self.upgrade()
            go_on()
        stop.set()
        for thread in threads:
            thread.join(12)
            self.assertFalse(thread.is_alive())
        self.assertEqual(wrong, [])
        for which, client in enumerate(clients):
            client.barrier()
            numbers = [int(n) for n in re.findall(rb"\nnumber (\d+)\.", client.seen)]
            self.assertEqual(numbers, list(range(1, sent[which] + 1)))

    def test_a_file_that_could_not_take_over(self):
        """It does not compile, is empty, cut off before main() is called, another program, or older
        than the proof.
        """
        self.start()
        alice = self.player("Alice", "alicepw")
        with open(HAS) as file:
            whole = file.read()
        hollow = rb"failed its rehearsal \(it ended without a proof"
        for text, expect in ((whole.replace("class Hub(Loop):", "class Hub(Loop)"),
                              rb"failed its rehearsal \(status 1"), ("", hollow),
                              (whole[:whole.index("if __name__ ==")], hollow), ("print('hello')\n",
                              hollow), ("print('HAS took over 1 sessions: 0')\n", hollow)):
            write_text(self.script, text)
            self.upgrade(expect)
            alice.barrier()
        os.unlink(self.script)
        self.upgrade(rb"USR2: the rehearsal could not be started: .*No such file")
        alice.barrier()
        self.assertNotIn(b"NOTICE", alice.seen)

    def test_what_runs_is_what_was_rehearsed(self):
        """The file changes while it is rehearsed: its bytes of before are what runs."""
        self.start()
        alice = self.player("Alice", "alicepw")
        self.edit('VERSION = "1.0"', 'VERSION = "1.0b"')
        after = len(self.has.log)
        self.has.signal(signal.SIGUSR2)
        self.has.wait_log(rb"rehearsing the upgrade", 20, after)
        write_text(self.script, "raise SystemExit\n")
        self.has.wait_log(rb"HAS 1\.0b goes on where HAS|HAS 1\.0b goes on where 1\.0 left off", 20,
                          after)
        alice.barrier()
        self.assertNotIn(b"NOTICE", alice.seen)

    def start_old(self, commit):
        program = old_program(commit)
        if program is None:
            self.skipTest("the has.py of before is not in the history of this checkout")
        if sys.version_info >= (3, 14) and b"class Heartbeat(threading.Thread)" in program:
            self.skipTest("the has.py of before cannot run under Python 3.14: it was a Thread")
        with open(self.script, "wb") as file:
            file.write(program)
        self.start_with_tls(fresh=True)
        return program

    def start_with_tls(self, *arguments, **more):
        cert, key = certificate(self.folder)
        self.tls_port = free_port()
        self.start(*arguments, local_port=free_port(), local_port_ssl=self.tls_port, ssl_cert=cert,
                   ssl_key=key, **more)

    def from_the_program_of_before(self, commit):
        """Users of a HAS that runs since before the rules of today are taken over, and back is
        refused.
        """
        program = self.start_old(commit)
        alice, lurker = self.player("Alice", "alicepw"), self.has.client()
        bob = self.player("Bob", "bobpw", tls=True)
        self.addCleanup(lurker.close)
        lurker.expect("Welcome")
        shutil.copy(HAS, self.script)
        self.upgrade()
        alice.barrier(), bob.barrier()
        self.assertEqual(len(self.mush.logins), 3)
        self.mush.kill()
        for client in (alice, bob, lurker):
            client.expect(re.escape(OFFLINE))
        self.upgrade()
        self.mush.start()
        for client in (alice, bob, lurker):
            client.expect(re.escape(ONLINE))
        alice.barrier(), bob.barrier()
        with open(self.script, "wb") as file:
            file.write(program)
        self.has.check_log()
        # the old program's, which does not know all that is packed
        self.has.faults = True
        self.upgrade(rb"failed its rehearsal")
        alice.barrier()

    def test_from_the_program_of_before_the_proof(self):
        self.from_the_program_of_before(OLD_PROGRAMS[0])

    def test_from_the_program_of_before_the_vault(self):
        self.from_the_program_of_before(OLD_PROGRAMS[1])

    def test_back_to_the_program_of_before_the_vault(self):
        """The new one fails where the rehearsal could not see it."""
        self.start_old(OLD_PROGRAMS[1])
        self.has.faults = True
        alice, bob = self.player("Alice", "alicepw"), self.player("Bob", "bobpw", tls=True)
        shutil.copy(HAS, self.script)
        self.edit("        hub.heartbeat = Heartbeat(hub, hub.mailbox, settings, parked)\n",
                  "        raise RuntimeError('planted')\n")
        self.upgrade(rb"(?s)planted.*goes on where")
        alice.barrier(), bob.barrier()
        shutil.copy(HAS, self.script)
        self.upgrade()
        alice.barrier(), bob.barrier()
        self.assertNotIn(b"NOTICE", alice.seen + bob.seen)

    def test_a_fault_of_the_upgrade_itself_disturbs_nobody(self):
        self.edit("        state = self.survival.pack(self.vault.shelf.name, going=True)\n",
                  "        raise ValueError('planted')\n")
        self.start(fresh=True)
        self.has.faults = True
        alice = self.player("Alice", "alicepw")
        after = len(self.has.log)
        self.has.signal(signal.SIGUSR2)
        self.has.wait_log(rb"(?s)a fault of HAS, which goes on as it is.*planted.*the heartbeat is",
                          20, after)
        alice.barrier()
        self.has.signal(signal.SIGUSR1)         # signals are not blocked any more
        self.has.wait_log(rb"INFO pid .*HAS 1", 10, after)

    def test_a_file_that_fails_while_restoring(self):
        self.start_with_tls()
        alice, bob = self.player("Alice", "alicepw"), self.player("Bob", "bobpw", tls=True)
        self.has.faults = True
        heartbeat = "hub.heartbeat = Heartbeat(hub, hub.mailbox, settings, parked)"
        self.edit(f"        {heartbeat}\n",
                  "        raise RuntimeError('planted')\n")
        self.upgrade(rb"(?s)planted.*goes on where")
        alice.barrier(), bob.barrier()
        self.assertNotIn(b"NOTICE", alice.seen + bob.seen)

    def survive_faults(self, times):
        """In the main loop, one after another: a player goes on after each."""
        self.edit("    def log_status(self):\n",
                  "    def log_status(self):\n        raise RuntimeError('planted')\n")
        self.start(fresh=True)
        self.has.faults = True
        alice = self.player("Alice", "alicepw")
        for _ in range(times):
            after = len(self.has.log)
            self.has.signal(signal.SIGUSR1)
            self.has.wait_log(rb"goes on where", 10, after)
            alice.barrier()

    def test_a_fault_in_the_main_loop_is_survived(self):
        self.survive_faults(3)
        self.has.signal(signal.SIGUSR1)
        self.has.wait_log(rb"HAS stops", 10)
        self.assertEqual(self.has.process.wait(10), 1)


def pythons():
    """The oldest and the newest Python that HAS supports, if pyenv has both."""
    root = pathlib.Path(os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))) / "versions"
    found = [sorted(root.glob(version + ".*/bin/python3")) for version in ("3.8", "3.13")]
    return [str(paths[-1]) for paths in found if paths]


@unittest.skipIf(len(pythons()) < 2, "no Python 3.8 and 3.13 in pyenv")
@again("test_plain_and_tls_users_notice_nothing")
class TestUpgradeOfPython(TestUpgrade):
    """python3 itself was replaced: the next upgrade goes on in the new one, and back."""

    def test_plain_and_tls_users_notice_nothing(self):
        self.link = os.path.join(self.folder, "python3")
        self.turns = itertools.cycle(pythons())
        os.symlink(next(self.turns), self.link)
        super().test_plain_and_tls_users_notice_nothing(self.link)

    def upgrade(self, expect=rb"goes on where"):
        os.unlink(self.link)
        os.symlink(next(self.turns), self.link)
        super().upgrade(expect)
        with open(f"/proc/{self.pid}/maps") as file:
            self.assertIn(os.path.dirname(os.path.dirname(os.readlink(self.link))), file.read())


@again("test_plain_and_tls_users_notice_nothing", "test_a_fault_in_the_main_loop_is_survived",
       "test_every_line_typed_during_upgrades_is_answered_once",
       "test_a_file_that_fails_while_restoring", "test_what_runs_is_what_was_rehearsed")
class TestUpgradeKept(TestUpgrade):
    """The same where a keeper outlives HAS."""

    def start(self, *arguments, **settings):
        if has.why_no_vault():
            self.skipTest(has.why_no_vault())
        super().start(*arguments, keeper="auto", **settings)

    def test_a_fault_in_the_main_loop_is_survived(self):
        """As often as it comes."""
        self.survive_faults(5)
        self.assertIn(b"its keeper starts it anew", self.has.log)

    def test_a_file_that_crashes_in_its_first_minute(self):
        """Not when it takes over: later, and in a way that nothing in it can see."""
        self.start()
        self.has.faults = True
        alice = self.player("Alice", "alicepw")
        self.edit('VERSION = "1.0"', 'VERSION = "1.0c"')
        self.edit("    def log_status(self):\n", "    def log_status(self):\n        os.abort()\n")
        self.upgrade(rb"HAS 1\.0c goes on where")
        alice.barrier()
        after = len(self.has.log)
        self.has.signal(signal.SIGUSR1)
        self.has.wait_log(rb"HAS 1\.0 goes on where 1\.0c left off", 10, after)
        self.has.wait_log(rb"HAS was killed by SIGABRT; its users were kept", 10, after)
        self.has.wait_log(rb"the new has.py has failed within a minute", 10, after)
        self.assertTrue(json.loads(self.has.ask("--status", "--json").stdout)["fell_back"])
        alice.barrier()
        self.has.signal(signal.SIGUSR1)
        self.has.wait_log(rb"INFO pid \d+ \(worker \d+\): HAS", 10, after)


class TestKeeper(Case):
    """A keeper outlives HAS: kill -9 costs nobody his session."""

    def setUp(self):
        if has.why_no_vault():
            self.skipTest(has.why_no_vault())
        self.mush = self.world()
        self.mush.quota = None

    def start(self, **settings):
        settings = {"beat": 0.3, **settings}
        self.has = Has(self, mush_address=self.mush.address, keeper="auto", **settings).wait_up()
        return self.has

    def player(self, name, password):
        client = self.client(self.has, f"connect {name} {password}", self.mush, name)
        return client

    def pids(self):
        """The keeper's and the worker's, as --status says."""
        status = json.loads(self.has.ask("--status", "--json").stdout)
        return status["pid"], status["worker"]

    def kill_worker(self, number=signal.SIGKILL):
        """Returns the next one."""
        _, worker = self.pids()
        after = len(self.has.log)
        os.kill(worker, number)
        self.has.wait_log(
            rb"its users were kept[^$]*goes on where|goes on where[^$]*its users were",
                          20, after)
        return self.pids()[1]

    def kill_keeper(self):
        keeper, worker = self.pids()
        after = len(self.has.log)
        os.kill(keeper, signal.SIGKILL)
        self.has.wait_log(rb"the keeper is pid \d+ now", 20, after)
        again, same = self.pids()
        self.assertNotEqual(again, keeper)
        self.assertEqual(same, worker)
        return again

    def test_users_notice_nothing_in_any_state(self):
        self.start()
        alice, lurker = self.player("Alice", "alicepw"), self.client(self.has)
        lurker.expect("Welcome")
        alice.send("say half")
        alice.send("-line\r\n").expect('You say, "half-line"')
        self.assertEqual(self.pids()[0], self.has.process.pid)
        workers = {self.pids()[1]} | {self.kill_worker() for _ in range(3)}
        self.assertEqual(len(workers), 4)
        self.assertEqual(self.pids()[0], self.has.process.pid)
        alice.barrier()
        lurker.log_in(self.mush, "Carol", "carolpw")
        self.assertEqual(len(self.mush.logins), 3)      # heartbeat, Alice, Carol: once each
        for client in (alice, lurker):
            self.assertNotIn(b"NOTICE", client.seen)
        self.mush.kill()
        for client in (alice, lurker):
            client.expect(re.escape(OFFLINE))
        self.kill_worker()
        alice.send("say x\r\n").expect(re.escape(UNSENT))
        self.mush.start()
        for client in (alice, lurker):
            client.expect(re.escape(ONLINE))
            client.barrier()
        alice.send("QUIT\r\n").expect_end()

    def test_where_there_was_none_an_upgrade_makes_one(self):
        self.has = Has(self, mush_address=self.mush.address, beat=0.3).wait_up()
        alice, worker = self.player("Alice", "alicepw"), self.has.process.pid
        self.has.configure(keeper="auto")
        self.has.signal(signal.SIGHUP)
        self.has.wait_log(rb"HUP: settings read")
        self.has.signal(signal.SIGUSR2)
        keeper = int(self.has.wait_log(rb"the keeper is pid (\d+) now").group(1))
        self.assertEqual(self.pids(), (keeper, worker))
        for _ in range(2):
            self.kill_worker()
            alice.barrier()
        self.assertEqual(self.pids()[0], keeper)
        os.kill(keeper, signal.SIGTERM)
        alice.expect(re.escape(RARE_NOTICES["goodbye_notice"]))
        alice.expect_end()
        self.has.faults = True                  # the process that was started was killed

    def start_in_tls(self, **settings):
        """With a TLS port, in front of a world in TLS: another HAS."""
        folder = new_folder(self)
        cert, key = certificate(folder)
        outer, self.tls_port = free_port(), free_port()
        Has(self, mush_address=self.mush.address, local_port_ssl=outer, ssl_cert=cert,
            ssl_key=key).wait_up()
        self.has = Has(self, mush_address=f"127.0.0.1:{outer}", mush_type="tinymux",
                       mush_ssl="yes", mush_ssl_ca=cert, keeper="auto", beat=0.3,
                       local_port=free_port(), local_port_ssl=self.tls_port, ssl_cert=cert,
                       ssl_key=key, **settings).wait_up()

    def in_tls(self, name, password):
        client = closed_after(self, TLSClient(self.tls_port))
        client.send(f"connect {name} {password}\r\n")
        self.mush.wait(lambda w: w.online(name), what=f"{name} is in")
        client.barrier()
        return client

    def front(self):
        """The process that speaks TLS."""
        pid, = json.loads(self.has.ask("--status", "--json").stdout)["fronts"]
        return pid

    def test_users_and_links_in_tls_notice_nothing(self):
        self.start_in_tls()
        alice, plain = self.in_tls("Alice", "alicepw"), self.player("Bob", "bobpw")
        front = self.front()
        for _ in range(3):
            self.kill_worker()
            for client in (alice, plain):
                client.barrier()
        self.assertEqual(self.front(), front)
        with open(f"/proc/{front}/status") as file:             # it runs from compiled code
            self.assertLess(int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)), 40000)
        keeper = self.kill_keeper()
        self.addCleanup(self.end_keeper, keeper)
        self.has.faults = True                  # the first one was killed
        self.kill_worker()
        alice.barrier()
        names = [it[0].lower() for it in self.mush.logins]
        self.assertEqual([names.count(name) for name in ("alice", "bob")], [1, 1], names)
        self.assertNotIn(b"NOTICE", alice.seen + plain.seen)
        self.in_tls("Carol", "carolpw")
        os.kill(front, signal.SIGKILL)
        alice.expect_end()
        plain.expect(re.escape(ONLINE))         # his link was in it
        self.assertIn(b"the process that speaks TLS", self.has.log)
        alice = self.in_tls("Alice", "alicepw")
        self.assertNotEqual(self.front(), front)
        for number in (signal.SIGQUIT, signal.SIGTERM):     # systemd without KillMode=process
            os.kill(self.front(), number)
            alice.expect_end()
            alice = self.in_tls("Alice", "alicepw")
        os.kill(keeper, signal.SIGTERM)
        plain.expect(re.escape(RARE_NOTICES["goodbye_notice"]))

    @staticmethod
    def end_keeper(pid):
        """One that is not our child."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def test_nobody_is_left_to_serve(self):
        """Worker and keeper are killed at once: what speaks TLS ends, too."""
        self.start_in_tls()
        alice, front = self.in_tls("Alice", "alicepw"), self.front()
        keeper, worker = self.pids()
        os.kill(worker, signal.SIGSTOP)         # it shall start no other keeper
        for pid in keeper, worker:
            os.kill(pid, signal.SIGKILL)
        alice.expect_end()
        until = time.monotonic() + 20
        while os.path.exists(f"/proc/{front}") and time.monotonic() < until:
            select.select([], [], [], 0.05)
        self.assertFalse(os.path.exists(f"/proc/{front}"))
        self.has.faults = True

    def test_keeper_and_worker_killed_in_turns(self):
        self.start()
        alice = self.player("Alice", "alicepw")
        keeper = None
        for _ in range(2):
            keeper = self.kill_keeper()
            alice.barrier()
            self.kill_worker()
            alice.barrier()
        self.kill_keeper()
        keeper = self.kill_keeper()
        alice.barrier()
        self.assertNotIn(b"NOTICE", alice.seen)
        os.kill(keeper, signal.SIGTERM)         # the one that is known now
        alice.expect(re.escape(RARE_NOTICES["goodbye_notice"]))
        alice.expect_end()
        self.has.faults = True                  # the first keeper was killed
        self.has._reader.join(10)
        self.assertFalse(self.has._reader.is_alive())   # nobody holds its log any more

    def test_deaths_leave_nothing_behind(self):
        self.start(beat=10)
        clients = [self.player("Alice", "alicepw"), self.player("Bob", "bobpw")]
        sizes, keeper = [], self.has.process.pid
        for _ in range(6):
            worker = self.kill_worker()
            for client in clients:
                client.barrier()
            files = [sorted(os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0]
                            for fd in os.listdir(f"/proc/{pid}/fd")) for pid in (keeper, worker)]
            sizes.append(files)
        self.assertEqual(sizes[1], sizes[-1])
        self.assertEqual(len(self.mush.logins), 3)

    def test_signals_and_the_exit_status(self):
        self.start()
        alice = self.player("Alice", "alicepw")
        self.has.signal(signal.SIGUSR1)
        self.has.wait_log(rb"INFO pid %d \(worker \d+\)" % self.has.process.pid)
        self.has.signal(signal.SIGHUP)
        self.has.wait_log(rb"HUP: settings read")
        self.kill_worker()
        self.has.signal(signal.SIGINT)
        alice.expect(re.escape(RARE_NOTICES["goodbye_notice"]))
        self.assertEqual(self.has.process.wait(10), 0)

    def test_who_is_killed_while_he_says_goodbye_stays_dead(self):
        self.start()
        alice = self.player("Alice", "alicepw")
        alice.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.mush.emit("Alice", b"x" * 78 * 40000)      # she does not read: HAS waits for her
        poll_until(lambda: re.search(r'"bytes_out": \d{7}',
                                     self.has.ask("--status", "--json").stdout),
                   lambda: "the world's flood does not come", 0.05)
        worker = self.pids()[1]
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(self.has.folder + "/has.sock")
            sock.sendall(b'{"do": "stop"}\n')
            self.assertIn(b"goodbye", sock.recv(999))
            self.has.wait_log(rb"stopping: ")
        os.kill(worker, signal.SIGKILL)
        self.assertEqual(self.has.process.wait(10), 0)

    def test_an_order_that_is_not_answered(self):
        """HAS dies, or ends, while it carries it out."""
        folder = new_folder(self)
        with open(folder + "/has.conf", "w"):
            pass
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(folder + "/has.sock")
            listener.listen()

            def die():
                sock, _ = listener.accept()
                with sock:
                    sock.recv(999)
            thread = threading.Thread(target=die)
            thread.start()
            done = run_main("--config", folder + "/has.conf", "--notice", "x")
            thread.join()
        self.assertEqual(done.returncode, 1)
        self.assertIn("before it answered", done.stderr)

    def test_an_upgrade_in_which_it_dies(self):
        self.start()
        self.has.faults = True
        before = json.loads(self.has.ask("--status", "--json").stdout)
        self.assertFalse(before["fell_back"])

        def kill():
            self.has.wait_log(rb"rehearsing the upgrade")
            os.kill(before["worker"], signal.SIGKILL)
        thread = threading.Thread(target=kill)
        thread.start()
        done = self.has.ask("--upgrade")
        thread.join()
        self.assertEqual((done.returncode, "has died in the upgrade" in done.stderr), (1, True),
                         done)
        after = json.loads(self.has.ask("--status", "--json").stdout)
        self.assertEqual((after["takeovers"], after["fell_back"]), (1, False))

    def test_what_cannot_start_ends_with_its_status(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            folder = new_folder(self)
            conf = os.path.join(folder, "has.conf")
            with open(conf, "w") as file:
                file.write(f"local_address = 127.0.0.1\nlocal_port = {taken.getsockname()[1]}\n"
                           "local_port_ssl = 0\nlog_file =\nkeeper = auto\n")
            done = run_failing("--config", conf)
        self.assertEqual((done.returncode, os.listdir(folder)), (1, ["has.conf"]))
        self.assertIn("Address already in use", done.stderr)

    def test_who_stops_it_while_it_is_dead_is_heard(self):
        self.start()
        alice = self.player("Alice", "alicepw")
        _, worker = self.pids()
        os.kill(worker, signal.SIGKILL)
        self.has.signal(signal.SIGTERM)
        alice.expect(re.escape(RARE_NOTICES["goodbye_notice"]), 20)
        alice.expect_end()
        self.assertEqual(self.has.process.wait(10), 0)

    def test_a_loop_that_turns_no_more_is_replaced(self):
        script = shutil.copy(HAS, new_folder(self))
        with open(script) as file:
            text = file.read()
        text = text.replace("WEDGED_SECONDS = 5, 60", "WEDGED_SECONDS = 0.3, 3")
        text = text.replace("    def log_status(self):\n", "    def log_status(self):\n"
                            "        while True:\n            pass\n", 1)
        write_text(script, text)
        self.start(script=script)
        self.has.faults = True
        alice = self.player("Alice", "alicepw")
        worker = self.pids()[1]
        os.kill(worker, signal.SIGSTOP)         # this is none
        with self.assertRaises(AssertionError):
            self.has.wait_log(rb"its users were kept", 4)
        os.kill(worker, signal.SIGCONT)
        alice.barrier()
        self.assertEqual(self.pids()[1], worker)
        self.has.signal(signal.SIGUSR1)
        self.has.wait_log(rb"did not turn for .* and was killed; its users were kept", 20)
        alice.barrier()

    def test_a_session_that_kills_who_takes_it_up(self):
        """The third time it is given up; a kill from outside is no sign."""
        script = shutil.copy(HAS, new_folder(self))
        with open(script) as file:
            text = file.read()
        text = text.replace("        Passage(session).unpack(packed, take)\n",
                            "        Passage(session).unpack(packed, take)\n"
                            "        if session.character.login and (\n"
                            "                session.character.login.name == b'Bob'):\n"
                            "            os.abort()\n", 1)
        write_text(script, text)
        self.start(script=script)
        self.has.faults = True
        alice, bob = self.player("Alice", "alicepw"), self.player("Bob", "bobpw")
        carol = self.player("Carol", "carolpw")
        os.kill(self.pids()[1], signal.SIGKILL)
        self.has.wait_log(rb"session \d+ is given up: HAS has died 3 times in a row", 20)
        alice.barrier(), carol.barrier()
        bob.send("connect Bob bobpw\r\n").expect("Bob|Welcome|connect")

    def test_strikes(self):
        vault = closed_after(self, has.Vault.make())
        self.mush.stop()

        def die(at, status=-signal.SIGABRT):
            vault.take_up(at)
            vault.board.put(has.Board.LAST, status)
            return vault._poison()
        self.assertEqual([die(7), die(7), die(8), die(7), die(7), die(7)], [-1] * 5 + [7])
        self.assertEqual([die(9), die(9), die(9, -signal.SIGKILL), die(9)], [-1] * 3 + [9])
        self.assertEqual([die(5), die(5), die(0), die(5)], [-1] * 4)

    def test_pauses_between_starts(self):
        keeper = has.Keeper(has.Vault.make(), [])
        self.addCleanup(keeper._vault.close)
        self.mush.stop()
        pauses = [keeper._pause(1, False) for _ in range(12)]
        self.assertEqual(pauses[:4], [0, 0.1, 0.2, 0.4])
        self.assertEqual(pauses[-1], keeper.LONGEST_PAUSE)
        self.assertEqual(keeper._pause(31, False), 0)
        self.assertEqual([keeper._pause(2, True) for _ in range(5)], [0] * 5)   # from outside
        self.assertAlmostEqual(keeper._pause(0.25, True), 0.75)

    def test_a_signal_between_two_workers_goes_to_nobody_else(self):
        keeper = has.Keeper(has.Vault.make(), [])
        self.addCleanup(keeper._vault.close)
        self.mush.stop()
        with mock.patch.object(has.os, "kill") as kill:
            keeper._worker = os.spawnlp(os.P_NOWAIT, "true", "true")
            keeper._reap()
            keeper._pass_on(signal.SIGHUP, None)
        self.assertEqual((kill.call_count, keeper._waiting), (0, [signal.SIGHUP]))

    def test_passwords_are_in_memory_only(self):
        self.start()
        self.player("Alice", "alicepw")
        keeper, worker = self.pids()
        for pid in (keeper, self.kill_worker()):
            for name in ("cmdline", "environ"):
                self.assertNotIn(b"alicepw", pathlib.Path(f"/proc/{pid}/{name}").read_bytes())
            for fd in os.listdir(f"/proc/{pid}/fd"):
                path = ""
                with contextlib.suppress(FileNotFoundError):    # closed meanwhile
                    path = os.readlink(f"/proc/{pid}/fd/{fd}")
                self.assertFalse(path.startswith("/") and not path.startswith(("/dev/", "/memfd:"))
                                 and os.path.exists(path) and self.has.folder in path, path)


class Manager:
    """Stands for systemd: starts HAS as a service of Type=notify with a descriptor store."""

    def __init__(self, case, arguments):
        self.folder = new_folder(case, prefix="has-systemd-")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.folder + "/notify")
        self.sock.settimeout(20)
        self.arguments, self.store, self.told, self.process = arguments, {}, [], None
        case.addCleanup(self.end)

    def start(self):
        """Start it, with what is in the store, as LISTEN_FDS of sd_listen_fds(3) has it."""
        names, self.told = list(self.store), []
        environment = {**os.environ, "NOTIFY_SOCKET": self.folder + "/notify", "FDSTORE": "16",
                       "WATCHDOG_USEC": "60000000"}
        if names:
            environment.update(LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
        ours = [self.store[name] for name in names]
        moved = "".join(f"exec {100 + n}<&{fd}; " for n, fd in enumerate(ours)) + "".join(
            f"exec {3 + n}<&{100 + n} {100 + n}<&-; " for n in range(len(ours)))
        command = f"{moved}LISTEN_PID=$$ exec \"$@\""
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", sys.executable, *self.arguments], env=environment,
            pass_fds=ours, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.wait("READY=1")
        return self

    def wait(self, text):
        """Wait until it tells us that."""
        while not any(text in it for it in self.told):
            data, control, *_ = self.sock.recvmsg(4096, socket.CMSG_SPACE(4))
            lines = data.decode().split("\n")
            name = next((it[7:] for it in lines if it.startswith("FDNAME=")), "")
            if "FDSTORE=1" in lines:
                self.store[name], = struct.unpack("i", control[0][2])
            if "FDSTOREREMOVE=1" in lines and name in self.store:
                os.close(self.store.pop(name))
            self.told.append(data.decode())

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.sock.close()
        for fd in self.store.values():
            os.close(fd)


class TestSystemd(Case):
    """A service with a descriptor store outlives kill -9 and `systemctl restart`."""

    def setUp(self):
        if has.why_no_vault() or not shutil.which("bash"):
            self.skipTest(has.why_no_vault() or "needs bash")
        self.mush = self.world()
        self.mush.quota = None
        self.folder = new_folder(self)
        self.port, self.script = free_port(), shutil.copy(HAS, self.folder)
        self.configure()
        self.service = Manager(self, [self.script, "--config", self.folder + "/has.conf"])

    def configure(self, **settings):
        settings = {"mush_address": self.mush.address, "local_address": "127.0.0.1", "beat": 0.3,
                    "local_port": self.port, "hb_user": "heartbeat", "hb_pass": "heartbeat",
                    "log_file": self.folder + "/has.log", "local_port_ssl": 0, **settings}
        with open(self.folder + "/has.conf", "w") as file:
            file.writelines(f"{key} = {value}\n" for key, value in settings.items())

    def log(self):
        return read_text(self.folder + "/has.log")

    def player(self):
        client = closed_after(self, Client(self.port))
        client.log_in(self.mush)
        return client

    def again(self, number):
        """It ends by this signal, and is started anew."""
        self.service.process.send_signal(number)
        status = self.service.process.wait(60)
        self.service.start()
        return status

    def test_kill_and_restart_and_stop(self):
        cert, key = certificate(self.folder)
        tls = {"local_port_ssl": free_port(), "ssl_cert": cert, "ssl_key": key}
        self.configure(**tls)
        self.service.start()
        self.assertEqual(len(self.service.store), 11)
        alice, bob = self.player(), TLSClient(tls["local_port_ssl"])
        self.addCleanup(bob.close)
        bob.send("connect Bob bobpw\r\n")
        self.mush.wait(lambda w: w.online("Bob"), what="Bob is in")
        bob.barrier()
        for _ in range(2):
            self.assertEqual(self.again(signal.SIGKILL), -signal.SIGKILL)
            alice.barrier(), bob.barrier()
        self.assertFalse([it for it in self.service.told if "FDSTORE" in it])   # all is there
        self.service.wait("WATCHDOG=1")
        with open(self.script) as file:
            text = file.read()
        write_text(self.script, text.replace('VERSION = "1.0"', 'VERSION = "1.0s"', 1))
        self.configure(admins="Alice", **tls)
        self.assertEqual(self.again(signal.SIGQUIT), 0)         # systemctl restart
        alice.barrier(), bob.barrier()
        self.assertIn("HAS 1.0s goes on where 1.0 left off", self.log())
        alice.send("#?\r\n").expect("pid")     # the new settings count
        self.assertNotIn(b"NOTICE", alice.seen + bob.seen)
        self.assertEqual(len(self.mush.logins), 3)
        self.service.process.send_signal(signal.SIGUSR2)
        alice.barrier(), bob.barrier()
        self.service.process.terminate()        # systemctl stop
        for client in (alice, bob):
            client.expect(re.escape("going down"))
            client.expect_end()
        self.assertEqual(self.service.process.wait(10), 0)
        self.service.start()                    # a store that was kept is of no use
        self.assertEqual(len(self.service.store), 11)
        self.assertEqual(len([it for it in self.service.told if "REMOVE" in it]), 11)
        self.player()

    def test_a_restart_with_a_file_that_cannot_go_on(self):
        """It waits until that is mended, and users play."""
        self.service.start()
        alice = self.player()
        text = read_text(self.script)
        for broken in ("", "def broken(:\n", None):
            if broken is None:
                os.unlink(self.script)
            else:
                write_text(self.script, broken)
            before = self.log().count("cannot go on")
            self.service.process.send_signal(signal.SIGQUIT)
            poll_until(lambda: self.log().count("cannot go on") > before, self.log)
            self.service.wait("EXTEND_TIMEOUT")
            self.service.wait("STATUS=")
            alice.barrier()
        write_text(self.script, text)
        self.assertEqual(self.service.process.wait(60), 0)
        self.service.start()
        alice.barrier()
        self.assertEqual(len(self.mush.logins), 2)

    def test_a_restart_with_a_file_that_crashes(self):
        self.service.start()
        alice = self.player()
        with open(self.script) as file:
            text = file.read()
        with open(self.script, "w") as file:
            file.write(text.replace("        if was_started:\n", "        os.abort()\n"
                                    "        if was_started:\n", 1))
        self.service.process.send_signal(signal.SIGQUIT)
        self.assertEqual(self.service.process.wait(60), 0)
        self.service.start()
        self.assertEqual(self.service.process.wait(60), -signal.SIGABRT)
        self.service.start()
        alice.barrier()
        self.assertIn("HAS 1.0 goes on where 1.0", self.log())


# ======================================================================
# HAS in front of a real TinyMUX
#
# Where one is installed (apt-get install tinymux).
# ======================================================================

class TestReattach(Case):
    """A user's own line drops, in front of every family."""

    FAMILIES = "tinymux", "pennmush", "tinymush", "rhostmush", "teenymush"

    def playing(self, family="tinymux", **settings):
        """(the world, HAS, Alice, Bob), both in the game."""
        world = self.world(family)
        world.quota = None
        served = Has(self, mush_address=world.address, reattach=60, **settings).wait_up()
        alice = self.client(served, "connect Alice alicepw", world, "Alice")
        return world, served, alice, self.client(served, "connect Bob bobpw", world, "Bob")

    def drop(self, served, client, notify=False):
        after = len(served.log)
        if notify:
            with contextlib.suppress(OSError, ValueError):
                client.sock.settimeout(0.1)
                client.sock.unwrap()
        client.close()
        # RST, if something was unread
        served.wait_log(rb"the line dropped.*his place is kept", after=after)

    def back(self, served, line="connect Alice alicepw"):
        client = self.client(served)
        client.send(line + "\r\n").expect("Welcome back: your place was kept for ")
        return client

    def test_nobody_sees_it(self):
        for family in self.FAMILIES:
            with self.subTest(family):
                world, served, alice, bob = self.playing(family)
                logins = len(world.logins)
                for number in range(2):
                    self.drop(served, alice)
                    bob.send(f"say while away {number}\r\n").expect(f"while away {number}")
                    alice = self.back(served)
                    alice.barrier()
                    self.assertEqual(alice.seen.count(f"while away {number}".encode()), 1)
                self.assertEqual(len(world.logins), logins)
                self.assertNotRegex(bob.text.decode(), "connected")
                alice.send("QUIT\r\n").expect_end()
                world.wait(lambda w: not w.online("Alice"), what="Alice has left")

    def test_who_knows_the_old_password_gets_in_nowhere(self):
        """It was changed in the game: in this session, by a wizard elsewhere, on a link of its
        own."""
        for family in self.FAMILIES:
            for elsewhere in (False, True):
                with self.subTest(family, elsewhere=elsewhere):
                    world, served, alice, bob = self.playing(family)
                    if elsewhere:
                        self.drop(served, alice)
                        world.players["Alice"] = "changed"
                        # then nobody can tell until he logs in
                        if not has.DIALECTS[family].check_function:
                            owner = self.client(served, "connect Alice changed", world, "Alice")
                            served.wait_log(rb"its character logged in with another password")
                    else:
                        alice.send("@password alicepw=changed\r\n")
                        served.wait_log(rb"changed the password")
                        alice.barrier()
                        self.drop(served, alice)
                    thief = self.client(served)
                    thief.send("connect Alice alicepw\r\n")
                    thief.expect(has.DIALECTS[family].refused_text)
                    self.assertNotIn(b"Welcome back", thief.seen)
                    if not elsewhere:
                        self.back(served, "connect Alice changed").barrier()

    def test_a_name_without_its_password_teaches_nothing(self):
        """Whether its place is kept, it plays, or is not there: the same text."""
        for family in self.FAMILIES:
            with self.subTest(family):
                world, served, alice, bob = self.playing(family)
                self.drop(served, alice)
                said = {}
                for name in ("Alice", "Bob", "Carol"):
                    stranger = self.client(served)
                    stranger.send(f"connect {name} guess\r\n")
                    stranger.expect(has.DIALECTS[family].refused_text)
                    said[name] = stranger.seen
                self.assertEqual(len(set(said.values())), 1, said)
                self.assertIn(b"connect", b"\n".join(str(line).encode() for line in world.lines))

    def test_an_upgrade_with_somebody_away(self):
        """USR2: the rehearsal takes his place over as well, and so does what follows."""
        world, served, alice, bob = self.playing()
        self.drop(served, alice)
        bob.send("say before\r\n").expect("before")
        after = len(served.log)
        served.signal(signal.SIGUSR2)
        served.wait_log(rb"goes on where", 20, after)
        bob.send("say behind\r\n").expect("behind")
        alice = self.back(served)
        self.assertRegex(alice.expect("That is all. You are back."), rb'(?s)"before".*"behind"')
        alice.barrier()

    def test_a_crash_with_somebody_away(self):
        world, served, alice, bob = self.playing()
        self.drop(served, alice)
        restart(world, bob)
        world.wait(lambda w: w.online("Alice"), what="HAS has brought Alice back, too")
        alice = self.back(served)
        self.assertRegex(alice.expect("That is all. You are back.").decode(),
                         f"(?s){re.escape(OFFLINE)}.*{re.escape(ONLINE)}")
        alice.barrier()

    def test_tls(self):
        """With close_notify and without, and another kind of client behind it."""
        folder = new_folder(self, prefix="has-tls-")
        cert, key = certificate(folder)
        tls_port = free_port()
        world, served, alice, bob = self.playing(
            local_port=free_port(), local_port_ssl=tls_port, ssl_cert=cert, ssl_key=key)
        for how in ("TLS", "notify", "plain"):
            self.drop(served, alice, notify=how == "notify")
            alice = Client(served.port) if how == "plain" else TLSClient(tls_port)
            self.addCleanup(alice.close)
            alice.send("connect Alice alicepw\r\n").expect("your place was kept")
            alice.barrier()
        self.assertNotRegex(bob.text.decode(), "connected")


class Router:
    """Two network namespaces in a row: whoever connects from the far one, his line can be cut
    without a word to
    either side. Needs root, and `ip`."""

    _HAND_OVER = ("import socket, sys, array\n"
                  "sock, out = socket.socket(), socket.socket(fileno=int(sys.argv[1]))\n"
                  "sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, int(sys.argv[4]))\n"
                  "sock.connect((sys.argv[2], int(sys.argv[3])))\n"
                  "out.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', "
                  "[sock.fileno()]))])\n")

    @staticmethod
    def missing():
        """Why there can be none here, or ""."""
        if sys.platform != "linux" or os.getuid():
            return "needs Linux and root"
        if not shutil.which("ip"):
            return "needs the program ip (iproute2)"
        name = f"has-try-{os.getpid()}"
        tried = subprocess.run(["ip", "netns", "add", name], stderr=subprocess.PIPE)
        if tried.returncode:
            return f"no network namespaces: {tried.stderr.decode().strip()}"
        subprocess.run(["ip", "netns", "del", name])
        return ""

    def __init__(self, case):
        number = random.SystemRandom().randrange(1, 250)
        net, tag = f"10.219.{number}", f"has{os.getpid() % 100000}"
        self.near, self.far, self.here = tag + "r", tag + "c", net + ".1"
        case.addCleanup(self._remove, tag)
        for line in (f"ip netns add {self.near}", f"ip netns add {self.far}",
                     f"ip link add {tag}h type veth peer name r0 netns {self.near}",
                     f"ip addr add {net}.1/30 dev {tag}h", f"ip link set {tag}h up",
                     f"ip -n {self.near} addr add {net}.2/30 dev r0",
                     f"ip -n {self.near} link set r0 up",
                     f"ip -n {self.near} link add r1 type veth peer name c0 netns {self.far}",
                     f"ip -n {self.near} addr add {net}.5/30 dev r1",
                     f"ip -n {self.near} link set r1 up",
                     f"ip -n {self.far} addr add {net}.6/30 dev c0",
                     f"ip -n {self.far} link set c0 up",
                     f"ip -n {self.far} route add default via {net}.5",
                     f"ip route add {net}.4/30 via {net}.2"):
            subprocess.run(line.split(), check=True)
        self.pass_on(True)

    def _remove(self, tag):
        for name in (self.near, self.far):
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", tag + "h"], stderr=subprocess.DEVNULL)

    def pass_on(self, yes):
        """Let packets through, or none."""
        subprocess.run(["ip", "netns", "exec", self.near, "sysctl", "-qw",
                        f"net.ipv4.ip_forward={int(yes)}"], check=True)

    def client(self, case, port, receive_buffer=65536):
        """A Client in the far namespace."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            subprocess.run(["ip", "netns", "exec", self.far, sys.executable, "-c", self._HAND_OVER,
                            str(theirs.fileno()), self.here, str(port), str(receive_buffer)],
                            pass_fds=[theirs.fileno()], check=True)
            _, passed, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
        client = Client.__new__(Client)
        client.sock = socket.socket(fileno=struct.unpack("i", passed[0][2][:4])[0])
        client.text = client.seen = b""
        case.addCleanup(client.close)
        return client


class TestCutLine(Case):
    """A line that is cut without a word: between client and HAS are two network namespaces."""

    @classmethod
    def setUpClass(cls):
        reason = Router.missing()
        if reason:
            raise unittest.SkipTest(reason)

    def setUp(self):
        self.router = Router(self)
        self.mush = self.world()
        self.mush.quota = None
        self.has = Has(self, mush_address=self.mush.address, reattach=60,
                       local_address=self.router.here, reattach_limit=1 << 20).wait_up()
        self.bob = self.far("Bob")

    def far(self, name, **how):
        """Somebody in the game who comes from the far namespace."""
        client = self.router.client(self, self.has.port, **how)
        client.send(f"connect {name} {name.lower()}pw\r\n")
        self.mush.wait(lambda w: w.online(name), what=f"{name} is in")
        client.barrier()
        client.text = b""
        return client

    def back(self):
        """Alice, by another line; and how long it took her."""
        client, began = Client(self.has.port, self.router.here), time.monotonic()
        self.addCleanup(client.close)
        client.send("connect Alice alicepw\r\n").expect("Welcome back|Limbo", 10)
        return client, time.monotonic() - began

    def test_an_idle_client_vanishes(self):
        alice = self.far("Alice")
        self.router.pass_on(False)
        select.select([], [], [], 0.1)          # what it has just acknowledged is no sign of life
        again, seconds = self.back()
        again.expect(": your place was kept for ")
        self.assertGreater(seconds, 2)
        again.barrier()
        self.router.pass_on(True)
        # once
        self.assertEqual(re.findall(rb"[^\r\n]*connected", self.bob.barrier()),
                         [b"Alice has connected"])
        self.assertEqual(len(self.mush.logins), 3)              # heartbeat, Bob, Alice

    def test_a_living_one_keeps_its_place(self):
        """Idle, and in the middle of much text."""
        alice = self.far("Alice")
        for busy in (False, True):
            if busy:
                self.mush.emit("Alice", b"x" * 60000 + b"\r\n")
            again, seconds = self.back()
            self.assertLess(seconds, 2)             # as who vanished is waited for
            again.barrier()
            alice.barrier()
        self.assertEqual(len(self.mush.online("Alice")), 3)

    def test_a_flood_is_cut_in_the_middle(self):
        """What the old client's kernel got, and what is shown to the new one: everything, once."""
        alice = self.far("Alice", receive_buffer=4096)
        for number in range(0, 6000, 50):
            self.mush.emit("Alice", b"".join(b"line %05d ----------------\r\n" % n
                                             for n in range(number, number + 50)))
            if number == 1000:
                alice.expect("line 00300")
        self.bob.barrier()
        self.has_rest(alice)
        self.router.pass_on(False)
        self.mush.emit("Alice", b"line 06000\r\n")
        again, _ = self.back()
        shown = again.expect("That is all. You are back.")
        self.router.pass_on(True)
        alice.seen += alice.sock.recv(1 << 22, socket.MSG_DONTWAIT)
        seen = alice.seen[:alice.seen.rfind(b"\n") + 1]
        numbers = [int(number) for number in re.findall(rb"(?m)^line (\d+)",
                                                        seen + shown.partition(b"You missed")[2])]
        self.assertEqual(numbers, list(range(6001)))

    def has_rest(self, alice):
        """Nothing more comes to a client that does not read."""
        before, count = -1, 0
        while before != count:
            before = count
            select.select([], [], [], 0.3)
            count = len(alice.sock.recv(1 << 22, socket.MSG_PEEK))


class TestRealTinyMUX(Scenarios, unittest.TestCase):
    """The same, in front of the real server."""

    family = "tinymux"
    logouts = TestTinyMUX.logouts + ("@force me=LOGOUT", "@wait 0=logout")      # typed by nobody
    test_logins_disabled_after_return = None    # @disable does not outlive a real start
    test_full_is_no_refusal = None              # nor does a limit of players

    def make_world(self):
        return RealWorld(self, {f"Evil{n}": password for n, password in enumerate(EVIL)})

    def evil_players(self):
        """They were made with the world."""

    def evil_done(self):
        return re.findall("#[0-9]+", self.world.command("think [search(name=PWNED)]"))

    def test_evil_passwords(self):
        super().test_evil_passwords()
        self.world.command("think [create(PWNED,10)]", "heartbeat", "heartbeat")
        self.assertEqual(len(self.evil_done()), 1, "such a deed is not found")

    def take_the_heartbeats_flag(self):
        self.world.command("@set *heartbeat=!wizard")

    def test_heartbeat_without_its_flag(self):
        self.assertRegex(self.has.probe(), "heartbeat's flag: nothing is missing")
        self.take_the_heartbeats_flag()
        self.world.boot("heartbeat")
        self.has.wait_log(rb"WARNING .*the heartbeat heartbeat has no WIZARD flag")
        self.assertRegex(self.has.probe(), "heartbeat's flag: lacks WIZARD")

    def change_password_while_down(self):
        self.world.command("@newpassword *Alice=changed")
        self.world.dump()
        self.world.kill()


class TestTelnetRealTinyMUX(TelnetCase):
    """Size, terminal, character set and a password with an accent survive a kill -9."""

    def test_return(self):
        folder = new_folder(self)
        mux = RealMux(folder)
        mux.start()
        self.addCleanup(mux.close)
        has = Has(self, mush_address=mux.address, mush_type="tinymux").wait_up()
        alice = closed_after(self, Terminal(has.port))
        alice.expect("Welcome")
        alice.wait(lambda c: {(WILL, NAWS), (WILL, BINARY), (DO, BINARY)} <= c.on,
                   "UTF-8 is agreed")
        alice.send("create Zoe caf\u00e9\r\n")
        self.look(alice)
        mux.command("@dump")
        poll_until(lambda: list(mux.game.glob("data/netmux.db.new")), mux.log_tail)
        for _ in range(2):
            count, on = len(alice.commands), set(alice.on)
            mux.kill()
            alice.expect(re.escape(OFFLINE) + r"\r\n")
            mux.start()
            alice.expect_notice(ONLINE, 8)
            self.look(alice)
            self.assertEqual(alice.on, on)
            self.assertEqual(alice.commands[count:], [])

    def test_a_password_beyond_ascii_typed_before_any_character_set(self):
        """The game has a character set of its own for those (default_charset)."""
        for charset, password in (("utf-8", "\u041f\u0430\u0440\u043e\u043b\u044c\xc1".encode()),
                                  ("latin-2", b"\xb1\xe6x"), ("ascii", b"m\xfcp")):
            with self.subTest(charset):
                mux = RealMux(new_folder(self), conf={"default_charset": charset})
                mux.start()
                self.addCleanup(mux.close)
                has = Has(self, mush_address=mux.address, mush_type="tinymux").wait_up()
                clients = []
                for port, word in ((mux.port, b"create"), (has.port, b"connect")):
                    clients.append(Client(port))
                    self.addCleanup(clients[-1].close)
                    clients[-1].expect("Welcome")
                    clients[-1].send(word + b" Zoe " + password + b"\r\n").expect("Limbo")
                mux.command("@dump")
                poll_until(lambda: list(mux.game.glob("data/netmux.db.new")), mux.log_tail)
                mux.kill()
                mux.start()
                clients[1].expect(re.escape(ONLINE), 8)
                clients[1].send("think [name(me)]\r\n").expect("Zoe")

    def test_a_password_with_an_accent_and_utf_8_by_lang(self):
        folder = new_folder(self)
        mux = RealMux(folder)
        mux.start()
        self.addCleanup(mux.close)
        has = Has(self, mush_address=mux.address, mush_type="tinymux").wait_up()
        zoe = closed_after(self, Client(has.port))
        zoe.expect("Welcome")
        zoe.send(b"\xff\xfb\x27\xff\xfa\x27\0\0LANG\1de_DE.UTF-8\xff\xf0create Zoe caf\xc3\xa9\r\n")
        zoe.expect("Limbo")
        mux.command("@dump")
        poll_until(lambda: list(mux.game.glob("data/netmux.db.new")), mux.log_tail)
        for _ in range(2):
            mux.kill()
            zoe.expect(re.escape(OFFLINE) + r"\r\n")
            mux.start()
            zoe.expect_notice(ONLINE, 8)
            zoe.send("think <[name(me)] \u00e9>\r\n").expect("<Zoe \u00e9>\r\n")

    def look(self, alice):
        alice.send("think <[name(me)] [width(me)] [height(me)] \u00e9>\r\n")
        shown = alice.expect("<Zoe.*>\\r\\n")
        self.assertTrue(shown.endswith("<Zoe 132 43 \u00e9>\r\n".encode()), shown)


# ======================================================================
# Tools
#
# Clients, HAS as a program, scripted worlds, the real TinyMUX; --bench, --demo, --soak; how tests
# are run. No test stands behind this line.
# ======================================================================

# ---- A client, and HAS in a process of its own

class Client:
    """A player's connection to HAS (or straight to a world). Never sleeps: it waits for text, with
    a deadline.
    """

    def __init__(self, port, host="127.0.0.1", receive_buffer=0):
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(5)
        self.sock.connect((host, port))
        self.text, self.seen = b"", b""

    def send(self, data):
        self.sock.sendall(data.encode() if isinstance(data, str) else data)
        return self

    def _read(self, until):
        self.sock.settimeout(max(0.001, until - time.monotonic()))
        data = self.sock.recv(262144)
        self.text += data
        self.seen += data
        return data

    def expect(self, pattern, seconds=10.0):
        """Read until `pattern` (bytes or text, a regular expression).

        Return all text up to its end.
        """
        pattern = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        until = time.monotonic() + seconds
        while True:
            match = pattern.search(self.text)
            if match:
                found, self.text = self.text[:match.end()], self.text[match.end():]
                return found
            try:
                ended = not self._read(until)
            except socket.timeout:
                raise AssertionError(
                    f"no {pattern.pattern!r} in {seconds} s; unread: {self.text!r}") from None
            except OSError as error:
                raise AssertionError(
                    f"{error} before {pattern.pattern!r}; unread: {self.text!r}") from None
            if ended:
                raise AssertionError(f"closed before {pattern.pattern!r}; unread: {self.text!r}")

    def skip(self, pattern):
        """As expect(), for megabytes: nothing of them is kept."""
        data = b""
        while not re.search(pattern, data):
            data = data[-200:] + self.sock.recv(262144)

    def expect_notice(self, text, seconds=10.0):
        """Read until the notice; nothing came with it but a colour reset, and that only after an
        escape of the world's.
        """
        coloured = b"\x1b" in self.seen[:len(self.seen) - len(self.text)]
        found, wanted = self.expect(re.escape(text) + r"\r\n", seconds), text.encode() + b"\r\n"
        if found != (b"\x1b[0m" if coloured else b"") + wanted:
            raise AssertionError(f"not the notice alone: {found!r}")

    def expect_end(self, seconds=10.0):
        """Read until the connection is closed; return the last text."""
        until = time.monotonic() + seconds
        try:
            while self._read(until):
                pass
        except socket.timeout:
            raise AssertionError(f"still open after {seconds} s; unread: {self.text!r}") from None
        except ConnectionResetError:
            pass
        text, self.text = self.text, b""
        return text

    def barrier(self):
        """Have the game answer a unique line; return what came before it: the proof that nothing
        else came.
        """
        mark = f"barrier-{next(_marks)}"
        before = self.send(f"say {mark}\r\n").expect(rb'"?%s"?\r?\n' % mark.encode())
        return before.rpartition(b"You say")[0]

    def log_in(self, world, name="Alice", password="alicepw"):
        """Log in; the game has it so."""
        self.send(f"connect {name} {password}\r\n")
        world.wait(lambda w: w.online(name), what=f"{name} is in")
        self.barrier()

    def reset(self):
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        self.sock.close()


_marks = itertools.count(1)


class Terminal(Client):
    """A client that speaks telnet as RFC 1143 wants it (it answers changes only), on a thread of
    its own.
    """

    def __init__(self, port, agrees=EVERYTHING, size=(132, 43)):
        super().__init__(port)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.agrees, self.size, self.types = set(agrees), size, itertools.cycle(TTYPES)
        # {(DO or WILL, option)} the other side may count on
        self.on, self.commands = set(), []
        self.raw, self.rest, self.fresh, self.over = b"", b"", b"", False
        self.change = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while not self.over:
            try:
                self.sock.settimeout(None)
                data = self.sock.recv(65536)
            except OSError:
                data = b""
            with self.change:
                self.raw, self.over = self.raw + data, not data
                found, self.rest = tokens(self.rest + data)
                for token in found:
                    self._take(token)
                self.change.notify_all()

    def _take(self, token):
        if not is_command(token):
            self.fresh += token
            return
        self.commands.append(token)
        answer = self._answer(token) if self.agrees else b""
        if answer:
            self.sock.sendall(answer)

    def _answer(self, token):
        if token[1] in (DO, WILL):
            verb, refusal = (WILL, WONT) if token[1] == DO else (DO, DONT)
            if token[2] not in self.agrees:
                return offer((refusal, token[2]))
            new = (verb, token[2]) not in self.on
            self.on.add((verb, token[2]))
            return offer((verb, token[2])) + self._detail(verb, token[2]) if new else b""
        if token[1] in (DONT, WONT):
            verb, answer = (WILL, WONT) if token[1] == DONT else (DO, DONT)
            known = (verb, token[2]) in self.on
            self.on.discard((verb, token[2]))
            return offer((answer, token[2])) if known else b""
        if token[1:4] == bytes((SB, TTYPE, 1)):
            return sub(TTYPE, b"\0" + next(self.types))
        return sub(CHARSET, b"\x02UTF-8") if token[1:4] == bytes((SB, CHARSET, 1)) else b""

    def _detail(self, verb, option):
        if (verb, option) == (WILL, NAWS):
            return naws(*self.size)
        return CORE_HELLO + CORE_SUPPORTS if (verb, option) == (DO, GMCP) else b""

    def _read(self, until):
        with self.change:
            if not self.change.wait_for(lambda: self.fresh or self.over,
                                        max(0.001, until - time.monotonic())):
                raise socket.timeout()
            data, self.fresh = self.fresh, b""
        self.text += data
        self.seen += data
        return data

    def wait(self, predicate, what):
        with self.change:
            if not self.change.wait_for(lambda: predicate(self), 5):
                raise AssertionError(f"{what} did not happen; {self.on} {self.raw[-500:]!r}")

    def resize(self, width, height):
        self.size = width, height
        return self.send(naws(width, height))

    def close(self):
        try:
            self.sock.shutdown(socket.SHUT_RDWR)    # ends the thread's recv
        except OSError:
            pass
        super().close()


@functools.lru_cache(None)
def calm_program():
    """A has.py that suspects nobody (in most tests worlds die just behind logins), compiled once.

    Returns the path of a program that starts it: half of what a start costs is compiling.
    """
    folder = tempfile.mkdtemp(prefix="has-calm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = pathlib.Path(HAS).read_text(encoding="utf-8")
    calm = text.replace("    WINDOW, APART,", "    WINDOW, APART = -1, 2\n    _, _,", 1)
    assert calm != text
    pathlib.Path(folder, "has.py").write_text(calm, encoding="utf-8")
    py_compile.compile(os.path.join(folder, "has.py"), doraise=True)
    start = pathlib.Path(folder, "start.py")
    start.write_text("import sys, has\nhas.prepare_output()\nsys.exit(has.main())\n",
                     encoding="utf-8")
    return str(start)


def run_main(*arguments):
    """has.main() in this process, for what does not start a HAS: its exit status and what it
    prints.
    """
    out, errors, level = io.StringIO(), io.StringIO(), has.log.level
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), \
            mock.patch.multiple(has.log, handlers=[], propagate=has.log.propagate):
        try:
            status = has.main(arguments)
        except SystemExit as end:
            status = end.code
        has.log.setLevel(level)
    return types.SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=errors.getvalue())


def run_failing(*arguments):
    """A HAS that ends by itself: its exit status and its log."""
    process = Born(arguments)
    with process.stderr:
        errors = process.stderr.read().decode()
    return types.SimpleNamespace(returncode=process.wait(10), stderr=errors)


class Nursery:
    """A process that has imported has.py and forks one HAS after another, without a start's cost.

    It is forked itself before the tests open anything or start a thread. Requests are lines of
    JSON, one at a time: {arguments, environ} and a descriptor for stderr beside it, answered by the
    new pid; or a pid, answered by its exit status, null while it lives. As in calm_program() nobody
    is suspected.
    """

    sock = None                     # our end; None: HASes are started in fresh interpreters

    @classmethod
    def open(cls):
        cls.sock, theirs = socket.socketpair()
        cls.lock = threading.Lock()
        sys.stdout.flush()
        sys.stderr.flush()
        if not os.fork():
            cls.sock.close()
            try:
                cls.serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    @classmethod
    def ask(cls, request, *fds):
        with cls.lock:
            cls.sock.sendmsg([json.dumps(request).encode() + b"\n"],
                             [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))
                              for fd in fds])
            return json.loads(cls.sock.recv(100).decode())

    @classmethod
    def serve(cls, sock):
        """Answer until the process of the tests has ended."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        data = b""
        while True:
            piece, control, *_ = sock.recvmsg(65536, socket.CMSG_SPACE(4))
            if not piece:
                return
            data += piece
            for _, _, packed in control:
                errors, = struct.unpack("i", packed)
            if data.endswith(b"\n"):
                request, data = json.loads(data.decode()), b""
                answer = cls.bear(errors,
                                  **request) if isinstance(request,
                                                           dict) else cls.status_of(request)
                sock.sendall(json.dumps(answer).encode())

    @staticmethod
    def status_of(pid):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            return None
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    @staticmethod
    def bear(errors, arguments, environ):
        """Fork a HAS whose stderr is this descriptor; return its pid."""
        pid = os.fork()
        if pid:
            os.close(errors)
            return pid
        status = 1
        try:
            os.dup2(errors, 2)
            for number in (0, 1):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.closerange(3, 1000)
            os.environ.clear()
            os.environ.update(environ)
            has.Suspects.WINDOW = -1
            sys.stdout, sys.stderr = (      # the old ones may stand for files that can be sought in
                open(fd, "w", buffering=1, errors="backslashreplace") for fd in (1, 2))
            status = has.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)


class Born:
    """A HAS of the nursery's: what we use of subprocess.Popen."""

    def __init__(self, arguments):
        ours, theirs = os.pipe()
        self.stderr, self.returncode = open(ours, "rb"), None
        self.pid = Nursery.ask({"arguments": arguments, "environ": dict(os.environ)}, theirs)
        os.close(theirs)

    def poll(self):
        if self.returncode is None:
            self.returncode = Nursery.ask(self.pid)
        return self.returncode

    def wait(self, timeout=60):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("has.py", timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Has:
    """has.py in a process of its own; has.conf is made of the keyword arguments.

    It listens on port 0, so that many run at once, and is a child of the nursery where there is
    one, unless the test needs a certain `script` or `python`.
    """

    faults = False                  # True: the test has planted one

    def __init__(self, case, python=sys.executable, script=None, arguments=(), **settings):
        self.folder = new_folder(case, prefix="has-test-")
        self.conf = os.path.join(self.folder, "has.conf")
        self.settings = {"local_address": "127.0.0.1", "local_port": 0, "beat": 1, "retry": 0.1,
                         "hb_timeout": 2, "max_per_host": 0, "log_level": "debug", "login_hold": 0,
                         "hold": 0, "log_file": "", "hb_user": "heartbeat", "hb_pass": "heartbeat",
                         "remotehostname_cmd": "auto", "mush_type": "auto", "resume_rate": "auto",
                         "max_clients": 0, "failover_after": 60, "failback_after": 0,
                         "dead_after": 60, "add_epoch_time": "yes", "proxy_from": "",
                         "output_limit": 1048576, "on_event": "", "deny": "", "keeper": "no",
                         "offline_notice": OFFLINE, "online_notice": ONLINE,
                         "unsent_notice": UNSENT, "moved_notice": MOVED, "silent_notice": SILENT,
                         "relogin_failed_notice": REFUSED}
        # an older has.py lacks some; calm_program() shows none
        known = has.read_constants(script or HAS)[0] or has.SETTINGS
        self.settings = {key: text for key, text in {**self.settings, **RARE_NOTICES}.items()
                         if key in known}
        self.configure(**settings)
        self._log, self._change = b"", threading.Condition()
        if Nursery.sock and not script and python == sys.executable:
            self.process = Born(["--config", self.conf, *arguments])
        else:
            self.process = subprocess.Popen(
                [python, script or calm_program(), "--config", self.conf, *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        case.addCleanup(self.end)
        self.port = int(self.wait_log(rb"listening on [0-9.]+:(\d+)").group(1))

    def configure(self, **settings):
        """Write has.conf anew."""
        self.settings.update(settings)
        write_text(self.conf, "".join(f"{key} = {value}\n" for key, value in self.settings.items()))
        os.chmod(self.conf, 0o600)

    def _read_log(self):
        for line in self.process.stderr:
            with self._change:
                self._log += line
                self._change.notify_all()

    @property
    def log(self):
        with self._change:
            return self._log

    def wait_log(self, pattern, seconds=10.0, after=0):
        """Wait for a log line that matches; return the match."""
        found = []

        def seen():
            found[:] = [re.compile(pattern).search(self._log, after)]
            return found[0] or self.process.poll() is not None and not self._reader.is_alive()
        with self._change:
            self._change.wait_for(seen, seconds)
        if not found[0]:
            raise AssertionError(
                f"no {pattern!r} in the log within {seconds} s:\n{self._log.decode()}")
        return found[0]

    def wait_count(self, text, count, seconds=10.0):
        """Wait until `text` stands in the log `count` times."""
        with self._change:
            if not self._change.wait_for(lambda: self._log.count(text) >= count, seconds):
                raise AssertionError(
                    f"{self._log.count(text)} of {count} times {text!r} in the log")

    def wait_up(self):
        self.wait_log(rb"is up")
        return self

    def wait_down(self):
        """Wait until it knows that there is no world: the main loop runs, which obeys TERM."""
        self.wait_log(rb"cannot be reached")
        return self

    def signal(self, number):
        self.process.send_signal(number)

    def client(self, **more):
        return Client(self.port, **more)

    def ask(self, *arguments):
        """`has.py --config (its has.conf) ARGUMENT ...`, see run_main."""
        return run_main("--config", self.conf, *arguments)

    def probe(self):
        """What `--check --probe` prints with the same has.conf."""
        return self.ask("--check", "--probe").stdout

    def memory(self):
        """Resident kilobytes."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))

    @property
    def worker(self):
        """The process that serves."""
        return json.loads(self.ask("--status", "--json").stdout)["worker"]

    def cpu_seconds(self, pid=None):
        """Of that process, or of the one that was started."""
        with open(f"/proc/{pid or self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        """TERM, and the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()             # a keeper would start it anew
                self.process.wait()
        self._reader.join(30)
        if self._reader.is_alive():             # closing what it reads would wait for ever
            raise AssertionError(f"a process of HAS is left:\n{self.log[-3000:].decode()}")
        self.process.stderr.close()
        return self.process.returncode

    def check_log(self):
        """Nothing has gone wrong inside HAS: a fault is survived, and only the log tells."""
        wrong = re.search(rb"Traceback|\ba fault\b|Exception ignored", self.log)
        if wrong and not self.faults:
            around = self.log[max(0, wrong.start() - 500):][:6000]
            raise AssertionError(f"HAS logged:\n{around.decode('utf-8', 'replace')}")

    def end(self):
        """What every test ends with: TERM is obeyed, and nothing went wrong."""
        status = self.stop()
        self.check_log()
        if status and not self.faults:
            raise AssertionError(
                f"HAS ended with status {status}:\n{self.log[-6000:].decode('utf-8', 'replace')}")


OFFLINE = "# NOTICE # This world is OFFLINE. Please wait till it returns."
ONLINE = "# NOTICE # This world is ONLINE again."
UNSENT = "# NOTICE # This world is OFFLINE. Not sent:"
MOVED = "# NOTICE # This world is moving to another machine."
SILENT = "# NOTICE # This world does not answer just now."
REFUSED = "# NOTICE # This world did not take your login."


def certificate(folder):
    """A self-signed certificate and its key; the tests need the openssl program for it."""
    cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return cert, key


class TLSClient(Client):
    """The same over TLS."""

    def __init__(self, port, host="127.0.0.1"):
        super().__init__(port, host)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.sock = context.wrap_socket(self.sock)


class Ports:
    """Ports for programs that bind them later: no other test, of any process, is given the same.

    They lie below those that the kernel gives to connects: while nobody listens none takes them,
    and a client that keeps trying is not connected to itself. A lock on one byte of a common file
    for each port, held until the process ends, is what other processes of the suite see; the set
    is for this one.
    """

    given = set()
    file = None

    @classmethod
    def free(cls):
        if cls.file is None:
            cls.file = open(os.path.join(tempfile.gettempdir(), f"has-test-ports-{os.getuid()}"),
                            "ab")
        while True:
            port = random.SystemRandom().randrange(5000, 32000)
            if port not in cls.given and cls.lock(port) and cls.unused(port):
                cls.given.add(port)
                return port

    @classmethod
    def lock(cls, port):
        try:
            fcntl.lockf(cls.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except OSError:
            return False                        # another process of the suite has it
        return True

    @staticmethod
    def unused(port):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                return False                    # another program has it
        return True


free_port = Ports.free


# ---- Scripted worlds
#
# Small fake MUSH servers that behave as strangely as the real ones. One daemon thread per world
# runs a selectors loop and owns every socket; methods called by a test run in that thread and are
# waited for. Where a recording disagrees with the facts files the recording won.
PLAYERS = {"heartbeat": "heartbeat", "Alice": "alicepw", "Bob": "bobpw", "Carol": "carolpw",
           "Wizard": "wizpw", "Mary Ann": "marypw"}
# every start of any world gets one of its own, long past
_start_ids = itertools.count(int(time.time()) - 10 ** 6)


class Connection:
    """One accepted socket and everything the world knows about it."""

    def __init__(self, world, sock, local):
        self.world, self.sock, self.local = world, sock, local
        self.id = next(world._ids)
        self.opened = time.monotonic()
        self.player = self.address_given = self.size = self.ttype = self.charset = self.epoch = None
        self.host, self.ip, self.utf8 = world.HOST, "127.0.0.1", False
        self.prefix = self.suffix = ""
        # SCREENWIDTH ... ; option -> set of verbs the client sent
        self.settings, self.options = {}, {}
        self.lines, self.raw = [], bytearray()
        # partial: one entry a character
        self.partial, self.queue, self.out = [], collections.deque(), bytearray()
        self.telnet_state, self.telnet_sub, self.begun = "text", bytearray(), b""
        self.failures, self.login_number, self.used = 0, 0, 0
        self.tokens, self.refilled = 100, time.monotonic()
        self.greeted = self.offered = self.telnet_ok = self.spoken = self.proxied = False
        self.closing = self.ghost = self.gone = False

    def __repr__(self):
        return "<Connection %d %s%s>" % (self.id, self.player or "login screen",
                                         " gone" if self.gone else "")

    def write(self, data):
        """One write, as the server does it: what the kernel takes goes out at once."""
        if not data or self.gone or self.closing or self.ghost:
            return
        self.world._note("<", self.id, data)
        self.out += data
        self.world._flush(self)

    def tell(self, text):
        self.write(self.world.encode(self, text))

    def finish(self, text=""):
        """Say the last words, then close (FIN) once they are out."""
        self.tell(text)
        self.closing = True
        self.queue.clear()
        self.world._flush(self)


class World:
    """What all families share: sockets, timers, telnet, line editing, players, the methods tests
    call.
    """
    family = "plain"
    HOST, EOL, BANNER, BACKLOG, FIRST_NUMBER = "127.0.0.1", "\r\n", "Welcome\r\n", 64, 2
    ANSWERS = {}                # (verb, option) -> reply, where it is not a plain refusal
    ON_CONNECT = ()             # telnet offers, one write each
    EMPTY_LINES = KEEPS_PLAYERS = HAS_TELNET = GHOSTS = QUOTA = False
    MAX_LINE = 8000
    # with `paced`: seconds a login takes the real server, and more for each who is in already
    PACE = 0, 0                 # (worlds/return-speed.md; TinyMUX: less than this program needs)
    LOOK_UP_SECONDS = 5         # until a question that the name server has dropped is given up
    # (seconds, text before, text after, listener is closed meanwhile, telnet bytes)
    RESTART = None

    def __init__(self, players=None, port=0, backlog=None, unix_path=None, **quirks):
        self.players = dict(PLAYERS if players is None else players)
        self.wizards = {"heartbeat", "Wizard"}
        self.host, self.port, self.unix_path = "127.0.0.1", port, unix_path
        self.backlog = self.BACKLOG if backlog is None else backlog
        self.reset_on_kill = self.silent_banner = self.guests = False
        # as slow as the real one, and each of its writes a packet that waits for the last one's ACK
        self.paced = False
        self.lost_look_ups = ()     # of which connections of a life, counted from 1
        self.logins_disabled = self.accept_bug = self.strands = False
        self.telnet = self.trusted_address = self.quota = self.proxy_enabled = True
        self.start_id = self.max_players = self.sconnect_cmd = None
        self.silent_start, self.address_window, self.shutdown_delay = 1.0, 0.1, 2.0
        for name, value in quirks.items():
            if not hasattr(self, name):
                raise TypeError("unknown quirk: " + name)
            setattr(self, name, value)
        self._given_id = self.start_id
        self.connections, self.all_connections, self.lines, self.logins = [], [], [], []
        self.evaluated, self.forged, self.errors = [], [], []
        self.accepted = self.starts = self.looked_up = 0
        self.running = self.frozen = False
        self.numbers, self.last_seen = {}, {}
        self.failed, self.ip_failures = {}, {}
        for name in self.players:
            self.number(name)
        self._ids, self._login_ids, self._timer_ids = itertools.count(1), itertools.count(
            1), itertools.count()
        self._timers, self._calls, self._listeners, self._stranded = [], collections.deque(), [], []
        self._changed = threading.Condition()
        self._record = collections.deque(maxlen=3000)
        self._asleep = self._ended = False
        self._thread = self._reserve = None
        self._began = time.monotonic()
        self.dump()

    # -- what tests call ---------------------------------------------------------------------------

    @property
    def address(self):
        return "unix:" + self.unix_path if self.unix_path else "%s:%d" % (self.host, self.port)

    def online(self, name=None):
        """The connections logged in (as `name`, any case), oldest login first."""
        found = [c for c in list(self.connections) if c.player and
                 (name is None or c.player.lower() == name.lower())]
        return sorted(found, key=lambda c: c.login_number)

    def wait(self, predicate, seconds=10.0, what=""):
        """Block until predicate(world) is true; it is looked at after every turn of the world."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self.errors:
                result = predicate(self)
                if result:
                    return result
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            raise AssertionError("%s: %s did not happen in %.1f s\n%s\n%s" % (
                self.family, what or "what was waited for", seconds, "\n".join(self.errors),
                self.transcript(60)))

    def transcript(self, last=None):
        with self._changed:
            return "\n".join("%8.3f %s #%s %r" % entry
                             for entry in list(self._record)[-(last or 0):])

    def start(self):
        """A real start: new start id, same port, nothing remembered of connections."""
        self._do(self._start)
        return self

    def kill(self):
        """kill -9: every socket closed at once, nothing said."""
        self._do(self._die, self.reset_on_kill)

    def crash_losing(self):
        """kill -9 with what that loses: everything since the last dump (not on TinyMUSH, whose LMDB
        keeps it).
        """
        self._do(self._crash_losing)

    def dump(self):
        self._dumped = dict(self.players), dict(self.numbers), set(self.wizards)

    def shutdown(self, by="Wizard", delay=None):
        """@shutdown. TeenyMUSH is gone `delay` seconds later only: wait(lambda w: not w.running).
        """
        self._do(self._shutdown, by, self.shutdown_delay if delay is None else delay)

    def restart_in_place(self, by="Wizard"):
        """@restart, @reboot, @shutdown/reboot: the sockets survive; back when it is finished."""
        assert self.RESTART, self.family + " has no in-place restart"
        self._do(self._restart, by)
        self.wait(lambda w: not w._asleep, what="the in-place restart ends")

    def freeze(self):
        """SIGSTOP: the kernel goes on accepting up to the backlog, nothing is read or answered."""
        self._do(self._pause, True)

    def thaw(self):
        self._do(self._pause, False)

    def boot(self, name, by="Wizard", quiet=False):
        self._do(self._boot, name, by, quiet)

    def emit(self, name, raw):
        self._do(lambda: [c.write(raw) for c in self.online(name)])

    def keepalive(self):
        """TeenyMUSH: IAC NOP to every socket, also before login, without a line end (every 60 s
        there).
        """
        self._do(lambda: [c.write(b"\xff\xf1") for c in self.connections])

    def disable_logins(self, yes=True):
        self._do(setattr, self, "logins_disabled", yes)

    def stop(self):
        """Close everything and end the thread."""
        if self._thread:
            self._do(self._die, False)
            self._do(setattr, self, "_ended", True)
            self._thread.join(5)
            self._thread = None
        if self._reserve:
            self._reserve.close()
            self._reserve = None
        if self.unix_path and os.path.exists(self.unix_path):
            os.unlink(self.unix_path)
        if self.errors:
            raise AssertionError("%s: errors of the fake world:\n%s" % (
                self.family, "\n".join(self.errors)))

    # -- the thread --------------------------------------------------------------------------------

    def _do(self, function, *args):
        """Run it in the world's thread and wait for it."""
        if threading.current_thread() is self._thread:
            return function(*args)
        if not self._thread:
            self._launch()
        outcome, done = [], threading.Event()
        self._calls.append((functools.partial(function, *args), outcome, done))
        # full, or the thread has done it already and ended
        with contextlib.suppress(OSError):
            self._wake.send(b"!")
        if not done.wait(10):
            raise AssertionError(self.family + ": the world's thread is stuck\n" +
                                 self.transcript(60))
        if outcome:
            raise outcome[0]

    def _launch(self):
        self._ended = False
        self._selector = selectors.DefaultSelector()
        self._awake, self._wake = socket.socketpair()
        self._awake.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(self._awake, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._loop, name=self.family, daemon=True)
        self._thread.start()

    def _loop(self):
        while not self._ended:
            ready = self._selector.select(self._patience())
            with self._changed:
                try:
                    self._turn(ready)
                except Exception:
                    # a bug in the fake world must fail the test, not hang it
                    self.errors.append(traceback.format_exc())
                self._changed.notify_all()
        self._selector.close()
        self._awake.close()
        self._wake.close()

    def _patience(self):
        if self._calls:
            return 0
        if self.frozen or not self._timers:
            return None
        return max(0, self._timers[0][0] - time.monotonic())

    def _turn(self, ready):
        """Read everything that is ready, then run commands in turns: one of each connection, as the
        C servers do.
        """
        for key, events in ready:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._awake.recv(4096)
            elif key.fileobj.fileno() >= 0 and not self._stopped():
                key.data(key.fileobj, events)
        self._run_calls()
        while self._timers and not self.frozen and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
        self._run_commands()

    def _run_calls(self):
        while self._calls:
            function, outcome, done = self._calls.popleft()
            try:
                function()
            except Exception as error:
                outcome.append(error)
            done.set()

    def _at(self, delay, function, *args):
        """A timer; it is void if the world has died meanwhile."""
        life = self.starts
        def fire():
            if self.running and self.starts == life:
                function(*args)
        heapq.heappush(self._timers, (time.monotonic() + delay, next(self._timer_ids), fire))

    def _stopped(self):
        return self.frozen or self._asleep

    def _note(self, direction, number, data):
        self._record.append((time.monotonic() - self._began, direction, number, bytes(data[:2000])))

    # -- life and death ----------------------------------------------------------------------------

    def _start(self):
        assert not self.running, "already started"
        self.starts, self.looked_up = self.starts + 1, 0
        self.start_id = next(
            _start_ids) if self._given_id is None else self._given_id + self.starts - 1
        self._note("!", 0, b"start")
        self.ip_failures.clear()
        self.frozen = self._asleep = False
        self.running = True
        self._listen()

    def _listen(self):
        self._listeners = [self._tcp_listener()]
        if self.unix_path:
            if os.path.exists(self.unix_path):
                os.unlink(self.unix_path)
            self._listeners.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            self._listeners[1].bind(self.unix_path)
        for listener in self._listeners:
            listener.setblocking(False)
            listener.listen(self.backlog)
            if not self._stopped():
                self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def _bound(self):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.host, self.port))
        self.port = sock.getsockname()[1]
        return sock

    def _tcp_listener(self):
        """A second, never listening socket keeps the port ours while the world is down (connects
        are refused).
        """
        if self._reserve is None:
            self._reserve = self._bound()
        try:
            return self._bound()
        except OSError:                     # not every system lets two sockets be bound to one port
            self._reserve.close()
            return self._bound()

    def _close_listeners(self):
        for listener in self._listeners:
            self._unwatch(listener)
            listener.close()
        self._listeners = []

    def _die(self, reset=False):
        self._note("!", 0, b"dead")
        for conn in self.connections:
            if not conn.ghost:
                if reset:
                    conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                         struct.pack("ii", 1, 0))
                self._unwatch(conn.sock)
                conn.sock.close()
            conn.gone = True
        self.connections.clear()
        self._close_listeners()
        self._timers.clear()
        self.running = self.frozen = self._asleep = False

    def _crash_losing(self):
        if not self.KEEPS_PLAYERS:
            self.players, self.numbers, self.wizards = (type(it)(it) for it in self._dumped)
        self._die(self.reset_on_kill)

    def _clean_exit(self):
        """Saved, and the unix socket's file removed (after a kill -9 it stays behind)."""
        self.dump()
        self._die()
        if self.unix_path and os.path.exists(self.unix_path):
            os.unlink(self.unix_path)

    def _shutdown(self, by, delay):
        self._clean_exit()

    def _pause(self, frozen):
        self.frozen = frozen
        self._watch_all()

    def _watch_all(self):
        """Nothing is watched while frozen or in an in-place restart."""
        for sock in [c.sock for c in self.connections if not c.ghost] + self._listeners:
            self._unwatch(sock)
        if not self._stopped():
            for listener in self._listeners:
                self._selector.register(listener, selectors.EVENT_READ, self._accept)
            for conn in self.connections:
                self._flush(conn)

    def _unwatch(self, sock):
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def _restart(self, by):
        seconds, before, after, deaf, telnet = self.RESTART
        self._broadcast(before.format(by=by))
        self._asleep = True
        # RhostMUSH: connects are refused for 40 ms, all sockets are fine
        if deaf:
            self._close_listeners()
        self._watch_all()
        self._at(seconds, self._restarted, after, deaf, telnet)

    def _restarted(self, after, deaf, telnet):
        self._asleep = False
        if deaf:
            self._listen()
        for conn in self.connections:
            conn.write(telnet if self.telnet else b"")
        self._broadcast(after)
        self._watch_all()

    # -- sockets -----------------------------------------------------------------------------------

    def _accept(self, listener, _events):
        fresh, self._stranded = self._stranded, []
        if self.accept_bug:
            time.sleep(0.001)                   # as long as that is one instant (choreography.md 2)
        with contextlib.suppress(BlockingIOError):
            while True:
                fresh.append(listener.accept()[0])
        # PennMUSH: one of three connects in the same instant is not served
        if self.accept_bug and len(fresh) > 2:
            self._stranded.append(fresh.pop())  # until somebody else connects
        if self.strands and fresh:
            self.strands = False
            self._stranded.append(fresh.pop())
        for sock in fresh:
            self._adopt(sock)

    def _adopt(self, sock):
        sock.setblocking(False)
        local = sock.family != socket.AF_INET
        if not (local or self.paced):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conn = Connection(self, sock, local)
        self.accepted += 1
        self.connections.append(conn)
        self.all_connections.append(conn)
        self._note("!", conn.id, b"accepted")
        self._flush(conn)
        self.connected(conn)

    def look_up(self):
        """The address of a connection is looked up; seconds until that has failed, or 0."""
        self.looked_up += 1
        return self.LOOK_UP_SECONDS if self.looked_up in self.lost_look_ups else 0

    def connected(self, conn):
        """What the family says unasked."""
        if self.telnet:
            for part in self.ON_CONNECT:
                conn.write(part)
        if not self.silent_banner:
            conn.greeted = True
            conn.tell(self.BANNER)

    def _flush(self, conn):
        """Send what is held, watch for what is needed now, close when the last words are out."""
        try:
            while conn.out and not conn.gone and not conn.ghost:
                del conn.out[:conn.sock.send(conn.out)]
        except BlockingIOError:
            pass
        except OSError:
            conn.out.clear()
        if conn.gone or conn.ghost:
            return
        if conn.closing and not conn.out:
            return self._drop(conn)
        if self._stopped():
            return
        events = (0 if conn.closing else selectors.EVENT_READ) | (
            selectors.EVENT_WRITE if conn.out else 0)
        try:
            if self._selector.get_key(conn.sock).events != events:
                self._selector.modify(conn.sock, events, functools.partial(self._ready, conn))
        except KeyError:
            self._selector.register(conn.sock, events, functools.partial(self._ready, conn))

    def _ready(self, conn, _sock, events):
        if events & selectors.EVENT_WRITE:
            self._flush(conn)
        if conn.gone or conn.closing or not events & selectors.EVENT_READ:
            return
        try:
            data = conn.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._note(">", conn.id, data)
            conn.raw += data
            self.received(conn, data)
        else:
            self._hung_up(conn)

    def _hung_up(self, conn):
        """TinyMUX and RhostMUSH keep a closed connection in the game until its queued commands are
        done.
        """
        self._run_commands()
        if conn.gone:
            return
        if self.GHOSTS and conn.queue and conn.player:
            self._unwatch(conn.sock)
            conn.sock.close()
            conn.ghost = True
        else:
            self._drop(conn)

    def _drop(self, conn):
        if conn.gone:
            return
        self._note("!", conn.id, b"closed")
        self._unwatch(conn.sock)
        conn.sock.close()
        conn.gone = True
        conn.queue.clear()
        if conn in self.connections:
            self.connections.remove(conn)
        self._leave(conn)

    # -- input: telnet, editing, lines -------------------------------------------------------------

    # Byte by byte as worlds/bytes.md has it for each family; nothing of it is shared with has.py.

    ENDS, DROPPED, ERASERS = b"\n", b"\r\0", {}         # ERASERS: byte -> what the server answers

    def received(self, conn, data):
        lines = []
        self.read(conn, self._strip_telnet(conn, data) if self.HAS_TELNET and self.telnet else data,
                  lines)
        self.arrived(conn, lines)

    def read(self, conn, text, lines):
        for byte in text:
            self.byte(conn, byte, lines)

    def byte(self, conn, byte, lines):
        if byte in self.ENDS:
            self.end_line(conn, lines)
        elif byte in self.ERASERS:
            conn.write(self.ERASERS[byte])
            del conn.partial[-1:]
        elif byte not in self.DROPPED:
            self.store(conn, bytes((byte,)))

    def store(self, conn, *characters):
        conn.partial.extend(characters[:max(0, self.MAX_LINE - len(conn.partial))])

    def end_line(self, conn, lines):
        line = b"".join(conn.partial)
        conn.partial.clear()
        if line or self.EMPTY_LINES:
            lines.append(line)

    def arrived(self, conn, lines):
        for line in lines:
            self._heard(conn, line)
            conn.queue.append(self.decode(conn, line))

    def _heard(self, conn, line):
        conn.lines.append(line)
        self.lines.append((conn.id, line))

    def decode(self, conn, line):
        return line.decode("latin-1")

    def encode(self, conn, text):
        return text.encode("latin-1", "replace")

    def _strip_telnet(self, conn, data):
        """The text in `data`; telnet is obeyed. The state is kept over packets."""
        text = bytearray()
        for byte in data:
            getattr(self, "_telnet_" + conn.telnet_state)(conn, byte, text)
        return bytes(text)

    def _telnet_text(self, conn, byte, text):
        if byte == IAC:
            conn.telnet_state = "iac"
        else:
            text.append(byte)

    def _telnet_iac(self, conn, byte, text):
        conn.telnet_state = "text"
        if byte == IAC:
            self.doubled(conn, text)
        elif byte in VERBS:
            conn.telnet_state, conn.telnet_sub = "option", byte
        elif byte == SB:
            conn.telnet_state, conn.telnet_sub = "sub", bytearray()
        else:
            self.other_command(conn, byte, text)

    def doubled(self, conn, text):
        text.append(IAC)

    def other_command(self, conn, byte, text):
        self.telnet_command(conn, byte)

    def _telnet_option(self, conn, byte, text):
        conn.telnet_state = "text"
        self.negotiate(conn, conn.telnet_sub, byte)

    def _telnet_sub(self, conn, byte, text):
        if byte == IAC:
            conn.telnet_state = "sub_iac"
        else:
            conn.telnet_sub.append(byte)

    def _telnet_sub_iac(self, conn, byte, text):
        if byte == SE:
            conn.telnet_state = "text"
            self.subnegotiation(conn, bytes(conn.telnet_sub))
        elif byte == IAC:
            conn.telnet_state = "sub"
            conn.telnet_sub.append(byte)
        else:
            self.broken_sub(conn, byte, text)

    def broken_sub(self, conn, byte, text):
        """TeenyMUSH, RhostMUSH: it ends here, and the command is obeyed."""
        self._telnet_iac(conn, byte, text)

    def negotiate(self, conn, verb, option):
        known = conn.options.setdefault(option, set())
        known.discard(VERBS[{DO: DONT, DONT: DO, WILL: WONT, WONT: WILL}[verb]])
        known.add(VERBS[verb])
        refusal = {DO: offer((WONT, option)), WILL: offer((DONT, option))}.get(verb, b"")
        reply = self.ANSWERS.get((verb, option), refusal)
        conn.write(self.mssp() if reply == "mssp" else reply)

    def subnegotiation(self, conn, body):
        option, rest = body[:1], body[1:]
        if option == bytes((NAWS,)) and len(rest) == 4:
            conn.size = struct.unpack(">HH", rest)
        elif option == bytes((TTYPE,)) and rest[:1] == b"\0":
            conn.ttype = rest[1:].decode("latin-1")
        elif option == bytes((CHARSET,)) and rest[:1] == b"\x02":
            conn.charset = rest[1:].decode("latin-1")
            conn.utf8 = conn.charset.upper() == "UTF-8"

    def telnet_command(self, conn, command):
        pass

    def mssp(self):
        """Name, players and start id; TeenyMUSH has no other start id."""
        pairs = self.MSSP_PAIRS.format(players=len(self.online()), uptime=self.start_id,
                                       port=self.port)
        return sub(MSSP, pairs.encode("latin-1"))

    # -- commands ----------------------------------------------------------------------------------

    def _run_commands(self):
        """In turns, the newest connection first, one command each: C servers' order when several
        arrive together.
        """
        busy = True
        while busy and self.running and not self._stopped():
            busy = False
            for conn in reversed(list(self.connections)):
                if conn.queue and not conn.gone and not self._stopped() and self._affordable(conn):
                    busy = True
                    self.command(conn, conn.queue.popleft())
        for conn in [c for c in self.connections if c.ghost and not c.queue]:
            self._drop(conn)

    def _affordable(self, conn):
        """The quota: 100 commands at once, then one a second.

        What comes faster waits in the queue.
        """
        if not (self.QUOTA and self.quota) or conn.settings.get("NOQUOTA") == "YES":
            return True
        seconds = int(time.monotonic() - conn.refilled)
        conn.refilled += seconds
        conn.tokens = min(100, conn.tokens + seconds)
        if conn.tokens < 1:
            self._at(conn.refilled + 1 - time.monotonic(), int)      # only to wake up
            return False
        conn.tokens -= 1
        return True

    def command(self, conn, line):
        if line == "QUIT":
            return conn.finish()
        conn.tell("you said: %s\r\n" % line)

    # -- players -----------------------------------------------------------------------------------

    def number(self, name):
        return self.numbers.setdefault(
            name, max(self.numbers.values(), default=self.FIRST_NUMBER - 1) + 1)

    def find(self, text, connected_part=False):
        """A player by name (any case), *name, #dbref.

        PennMUSH's softcode takes parts of connected ones.
        """
        if text.startswith("#"):
            return next((n for n in self.players if "#%d" % self.number(n) == text), None)
        wanted = text.lstrip("*").lower()
        for name in self.players:
            if wanted == name.lower():
                return name
        parts = {c.player for c in self.online()
                 if c.player.lower().startswith(wanted)} if wanted and connected_part else ()
        return parts.pop() if len(parts) == 1 else None

    def is_wizard(self, name):
        return name in self.wizards

    def _rename(self, old, new):
        self.players = {new if name == old else name: word for name, word in self.players.items()}
        for table in (self.numbers, self.last_seen, self.failed):
            if old in table:
                table[new] = table.pop(old)
        if old in self.wizards:
            self.wizards = self.wizards - {old} | {new}
        for conn in self.online(old):
            conn.player = new

    def _broadcast(self, text):
        for conn in self.online():
            conn.tell(text)

    def _others(self, name, text):
        for conn in self.online():
            if conn.player != name:
                conn.tell(text)

    def _player(self, name, text):
        for conn in self.online(name):
            conn.tell(text)

    def _leave(self, conn):
        """A logged in connection is gone from the game; the others are told."""
        name, conn.player = conn.player, None
        if name and not conn.settings.get("DARK"):
            how = "partially disconnected" if self.online(name) else "disconnected"
            self._others(name, "%s has %s.%s" % (name, how, self.EOL))

    def _boot(self, name, by, quiet):
        for conn in self.online(name):
            conn.finish()


# ---- Softcode, and what the families share

class Plain(World):
    """No login, no telnet: echoes lines."""


class Deadly(Exception):
    """What kills a real server: an error of the scripted one, which fails the test."""


class Halt(Exception):
    """No reply at all (TeenyMUSH with CJK text)."""


class Softcode:
    """A small softcode evaluator: [ ], functions, { }, \\, %x, nested parentheses.

    What is not escaped is evaluated.
    """
    HIDDEN = "\x01"                     # %b and "\ ": a blank that is not trimmed or squeezed

    def __init__(self, world, conn):
        self.world, self.conn, self.wizard = world, conn, world.is_wizard(conn.player)

    def run(self, text):
        return self.evaluate(text, 0, "", True)[0].replace(self.HIDDEN, " ")

    def evaluate(self, text, at, stops, function):
        """Text up to one of `stops`; `function`: a name( at the beginning is a call, in brackets
        also an unknown one.
        """
        out = ""
        while at < len(text) and text[at] not in stops:
            char = text[at]
            if char == "\\":
                out += text[at + 1:at + 2].replace(" ", self.HIDDEN)
                at += 2
            elif char == "%":
                piece, at = self.percent(text, at + 1)
                out += piece
            elif char == "[":
                piece, at = self.evaluate(text, at + 1, "]", "must")
                out, at = out + piece, at + 1
            elif char == "{":
                piece, at = self.evaluate(text, at + 1, "}", False)
                keep = "{%s}" if self.world.KEEPS_BRACES and "," not in stops else "%s"
                out, at = out + keep % piece, at + 1
            elif char == "(":
                out, at = self.parenthesis(text, at, out, function)
                function = False
            else:
                out, at = out + char, at + 1
        return out, at

    def percent(self, text, at):
        char = text[at:at + 1]
        if char in ("q", "v", "Q", "V"):
            return "", at + 2
        known = {"b": self.HIDDEN, "r": "\r\n", "t": "\t", "n": self.conn.player,
                 "N": self.conn.player}
        known.update({"#": "#%d" % self.world.number(self.conn.player)},
                     **dict.fromkeys("0123456789", ""))
        # RhostMUSH: %< %$ %c are substitutions too
        known.update(dict.fromkeys(self.world.EMPTY_PERCENTS, ""))
        known["!"] = known["#"]
        return known.get(char, char), at + 1

    def parenthesis(self, text, at, out, function):
        """A call when the name before it is one, else plain text with balanced parentheses."""
        name = out.strip().lower()
        known = name in self.world.FUNCTIONS or name in ("create", "pemit", "shutdown")
        if function and re.fullmatch(r"[a-z0-9_]+", name) and (known or function == "must"):
            # its arguments come out as plain text
            if not known and self.world.family == "tinymush":
                return self.missing(name), at + 1
            args, at = self.arguments(text, at + 1)
            return (self.call(name, out.strip(), args) if known else self.missing(out.strip())), at
        piece, at = self.evaluate(text, at + 1, ")", False)
        return out + "(" + piece + text[at:at + 1], at + 1

    def arguments(self, text, at):
        args = []
        while True:
            piece, at = self.evaluate(text, at, ",)", True)
            args.append(piece.strip(" ").replace(self.HIDDEN, " "))
            if text[at:at + 1] != ",":
                return args, at + 1
            at += 1

    def missing(self, name):
        return "#-1 FUNCTION (%s) NOT FOUND" % (
            name if self.world.family == "rhostmush" else name.upper())

    def call(self, name, typed, args):
        if name in ("create", "pemit", "shutdown"):
            self.world.evaluated.append("%s(%s)" % (name, ",".join(args)))
        if name not in self.world.FUNCTIONS:
            return self.missing(typed)
        return getattr(self, "f_" + name)(args)

    def f_strcat(self, args):
        return "".join(args)

    def f_hasflag(self, args):
        return str(int(self.wizard and args == ["me", "wizard"]))

    def f_decode64(self, args):
        """Latin-1 becomes ? as at the login, UTF-8 does not: a check of such a password comes out
        wrong.
        """
        try:
            raw = base64.b64decode(args[0].encode("ascii"), validate=True)
        except ValueError:
            return "#-1 INVALID BASE64"
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return re.sub("[^ -~]", "?", raw.decode("latin-1"))

    def f_password(self, args):
        """TeenyMUSH: *NAME in full or #5."""
        if not self.wizard:
            return "#-1 PERMISSION DENIED"
        if re.search("[\u0100-\U0010ffff]", "".join(args)):
            raise Halt()
        name = self.world.find(args[0]) if args[0][:1] in ("*", "#") else None
        if name is None:
            return "#-1 NO SUCH OBJECT"
        return str(int(args[1:] == [self.world.players[name]]))

    def f_checkpass(self, args):
        world = self.world
        if not self.wizard:
            return "#-1 PERMISSION DENIED"
        if len(args) != 2:
            return "#-1 FUNCTION (CHECKPASS) EXPECTS 2 ARGUMENTS " + world.GOT_ARGUMENTS % len(args)
        name = self.conn.player if args[0] == "me" else world.find(
            args[0], connected_part=world.family == "pennmush")
        if name:
            return str(int(world.players[name] == args[1]))
        if world.family == "pennmush" and args[0] != "here":
            world._player(self.conn.player, "I can't see that here.\r\n")
        return world.NO_PLAYER


def first_word(text, blanks=" \t"):
    """(word, rest): separated by any run of blanks."""
    text = text.lstrip(blanks)
    word = re.match("[^%s]*" % blanks, text).group()
    return word, text[len(word):].lstrip(blanks)


class Mush(World):
    """Logins and the game, as far as all five families agree."""
    HAS_TELNET = True
    FUNCTIONS = ["strcat"]
    KEEPS_BRACES, EMPTY_PERCENTS, SQUEEZE, AGAIN = True, "", True, "reconnected"
    HUH = 'Huh?  (Type "help" for help.)\r\n'
    FAILED = "Either that player does not exist, or has a different password."
    GAME = {"say": "say", "think": "think", "th": "think", "@pemit": "pemit",
            "@password": "password", "@name": "name", "look": "look"}
    MORE_GAME, TEXTS = {}, {}

    def command(self, conn, line):
        conn.used = int(time.time())
        (self.game if conn.player else self.login_screen)(conn, line)

    def encode(self, conn, text):
        return text.encode("utf-8", "replace")

    def date(self, when=None):
        return time.ctime(when)

    # -- logging in --

    def try_connect(self, conn, name_text, password, dark=False):
        if self.guests and name_text.lower() == "guest":
            self.players.setdefault("Guest", password)
            return self.welcome(conn, "Guest")
        name = self.login_name(name_text)
        if name is None or self.players[name] != password:
            if name:
                count = self.failed.get(name, (0,))[0] + 1
                self.failed[name] = (count, conn.host, self.date())
            return self.failure(conn, name)
        if not self.is_wizard(name) and self.refused(conn):
            return None
        return self.welcome(conn, name, dark=dark and self.is_wizard(name))

    def login_name(self, text):
        return self.find(text)

    def full(self):
        return self.max_players is not None and len(self.online()) >= self.max_players

    def refused(self, conn):
        return False

    def welcome(self, conn, name, created=False, dark=False):
        again = bool(self.online(name))
        if self.paced:
            once, more = self.PACE
            time.sleep(once + more * len(self.online()))
        conn.player, conn.login_number = name, next(self._login_ids)
        conn.settings["DARK"] = dark
        self.logins.append((name, conn.id, time.monotonic()))
        self.greet(conn, name, created, again)
        self.last_seen[name] = (conn.host, self.date())
        self.failed.pop(name, None)
        if not dark:
            self.announce(
                name, "%s has %s.%s" % (name, self.AGAIN if again else "connected", self.EOL))

    def announce(self, name, text):
        self._others(name, text)

    def tag(self, name):
        return "(#%d%s)" % (self.number(name), self.FLAGS[self.is_wizard(name)])

    def look_text(self, name):
        """The room; wizards see numbers."""
        others = list(dict.fromkeys(c.player for c in self.online() if c.player != name and
                                    not c.settings.get("DARK")))
        lines = [self.THING % (other, self.tag(other) if self.is_wizard(name) else "")
                 for other in others]
        return self.ROOM[self.is_wizard(name)] + (self.CONTENTS + "".join(lines) if lines else "")

    # -- in the game --

    def play(self, conn, line):
        if line.startswith('"'):
            return self.do_say(conn, line[1:])
        word, rest = first_word(line, " ")
        verb = self.verb(word.partition("/")[0])
        return getattr(self, "do_" + verb)(conn, rest) if verb else conn.tell(self.HUH)

    def verb(self, word):
        return self.MORE_GAME.get(word.lower()) or self.GAME.get(word.lower())

    def do_look(self, conn, rest):
        conn.tell(self.look_text(conn.player))

    def do_say(self, conn, text):
        self._player(conn.player, 'You say, "%s"%s' % (text, self.EOL))
        self._others(conn.player, '%s says, "%s"%s' % (conn.player, text, self.EOL))

    def do_think(self, conn, text):
        """To all connections of the character, not only the one that asked."""
        if self.SQUEEZE:
            text = re.sub("[ \t]+", " ", text).strip()
        with contextlib.suppress(Halt):
            result = Softcode(self, conn).run(text)
            if result.strip() or text and self.SQUEEZE or self.family == "tinymush":
                self._player(conn.player, result + self.EOL)

    def do_pemit(self, conn, rest):
        target, _, text = rest.partition("=")
        name = conn.player if target.strip() == "me" else self.find(target.strip())
        self._player(name or "", text + self.EOL)

    def do_password(self, conn, rest):
        old, _, new = rest.partition("=")
        old, new = old if self.family == "pennmush" else old.strip(), new.strip()
        if self.players[conn.player] != old:
            return conn.tell(self.TEXTS["wrong old"])
        if not new or " " in new or (self.family == "pennmush" and "=" in new):
            return conn.tell(self.TEXTS["blank" if new else "empty"])
        self.players[conn.player] = new
        conn.tell(self.TEXTS["password"])

    def do_name(self, conn, rest):
        """No password wanted; on Tiny and MUX what stands behind the name becomes part of it."""
        target, _, new = rest.partition("=")
        if target.strip().lstrip("*").lower() not in ("me", conn.player.lower()):
            return conn.tell("Permission denied." + self.EOL)
        new = self.new_name(conn, new.strip())
        owner = new and self.find(new)
        if not new or owner and owner != conn.player:
            return conn.tell(self.TEXTS["taken" if new else "bad name"])
        self._rename(conn.player, new)
        conn.tell(self.TEXTS["name"])

    def new_name(self, conn, new):
        return "" if re.search(r'[";=*#\[\]]', new) else new


# ---- TeenyMUSH

class TeenyMUSH(Mush):
    """Perl, one process: LF in the game, CRLF at the login screen, lines that arrive together run
    last first.
    """
    family, HOST, EOL = "teenymush", "localhost", "\n"
    BACKLOG, FIRST_NUMBER, AGAIN, PACE = 1, 4, "re-connected", (0, 0.0003)
    BANNER = ("Welcome to TeenyMUSH\r\n\r\n"
              "Type the below command to customize this screen after loging in as God.\r\n\r\n"
              "    &conf.login #0= Login screen\r\n\r\n")
    MOTD = ("   -------------------------------[ MOTD ]-------------------------------\n\n"
            "                           There is no MOTD today                        \n"
            "                   &conf.motd #0=<message> for your MOTD                 \n\n"
            "   " + "-" * 70 + "\n")
    EMPTY_LINES, MAX_LINE, DROPPED = True, 1 << 24, b""
    WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    ON_CONNECT = tuple(offer(pair) for pair in ((WILL, 3), (DO, NAWS), (DO, TTYPE), (WILL, MSSP)))
    ANSWERS = {(WILL, TTYPE): SEND_TTYPE, (DO, MSSP): "mssp", (DO, 1): offer((WILL, 1)),
               (DO, 3): b"", (WILL, NAWS): b""}
    MSSP_PAIRS = ("\x01NAME\x02TeenyMUSH\x01PLAYERS\x02{players}\x01UPTIME\x02{uptime}"
                  "\x01CODEBASE\x02TeenyMUSH 0.91"
                  "\x01FAMILY\x02Custom\x01PORT\x024096,4201,6250\x01CRAWL\x021")
    ROOM = ("The Void\nYou see nothing special.\n", "The Void(#1Rn)\nYou see nothing special.\n")
    FLAGS, THING, CONTENTS = ("Pnc", "PWnc"), "%s%s\n", "Contents:\n"
    HUH = 'Huh? (Type "HELP" for help.)\n'
    FUNCTIONS = Mush.FUNCTIONS + ["password"]
    KEEPS_BRACES, SQUEEZE = False, False
    MORE_GAME = {"quit": "quit", "who": "who"}
    USAGE = "Invalid command, try: cOnnect <user> <password>\r\n"
    # commit 495d335: no telnet in or out, ASCII only, whole words, CRLF in the game
    stable = False

    def __init__(self, *args, **quirks):
        super().__init__(*args, **quirks)
        self.telnet = self.telnet and not self.stable

    def received(self, conn, data):
        """CR goes first, even inside telnet. Of telnet commands `stable` keeps the ASCII part: it
        sticks to the next line.
        """
        data = data.replace(b"\r", b"")
        super().received(conn, bytes(byte for byte in data if byte < 128) if self.stable else data)

    def decode(self, conn, line):
        return line.decode("utf-8", "replace")

    def encode(self, conn, text):
        return super().encode(conn, re.sub("(?<!\r)\n", "\r\n", text) if self.stable and conn.player
                              else text)

    def arrived(self, conn, lines):
        """Login commands run at once; in the game the lines of one read run last first."""
        batch = []
        for line in lines:
            self._heard(conn, line)
            if conn.player:
                batch.append(self.decode(conn, line))
            elif not conn.closing:
                self.command(conn, self.decode(conn, line))
        conn.queue.extend(reversed(batch))

    def login_screen(self, conn, line):
        word, _, rest = line.lstrip(" " if self.stable else re.sub(
            "-.", "".join(map(chr, range(0x2001, 0x200b))), self.WHITE)
                                    ).partition(" ")
        low = word.lower()
        if not low or self.means(low, "who"):
            self.do_who(conn, rest)
        elif self.means(low, "quit"):
            conn.finish("\n")
        elif len(low) > 1 and self.means(low, "connect"):
            self.connect_line(conn, rest)
        elif self.means(low, "create"):                         # "c NAME PASS" is create
            self.create_line(conn, rest)
        elif self.means(low, "@remotehostname"):
            self.remotehostname(conn, rest)
        elif low in ("screenwidth", "screenheight"):
            conn.settings[low.upper()] = rest
        else:
            conn.tell(self.BANNER)

    def means(self, typed, word):
        return typed == word if self.stable else word.startswith(typed)

    def connect_line(self, conn, rest):
        rest = rest.strip(" ")
        match = re.fullmatch('(?:"([^"]*)"|([^ ]+))[%s]+([^ ]+)|([^ ]+)' % self.WHITE, rest)
        if not match:
            return conn.tell(self.USAGE)
        if match.group(4):
            return self.failure(conn, None)
        password = match.group(3)
        if re.search("[\u0100-\U0010ffff]", password):
            text = "god crashed the server with: connect %s %s\r\n" % (
                match.group(1) or match.group(2), password)
            self._broadcast(text)
            return conn.tell(text)
        return self.try_connect(conn, match.group(1) or match.group(2), password)

    def login_name(self, text):
        return None if text.startswith("*") else self.find(text)

    def failure(self, conn, name):
        conn.tell(self.FAILED + "\n")

    def create_line(self, conn, rest):
        words = rest.split(" ")
        if len(words) != 2:
            return conn.tell(self.USAGE.replace("cOnnect", "cReate"))
        if self.find(words[0]):
            return conn.tell("That name is already in use.\r\n")
        self.players[words[0]] = words[1]
        return self.welcome(conn, words[0], True)

    def remotehostname(self, conn, rest):
        """HOST or HOST=EPOCH, no reply; only the first counts, and only from the address in its
        source.
        """
        if conn.proxied:
            return self.forged.append((conn.id, rest))
        if not self.trusted_address:
            return None
        conn.proxied = True
        match = re.fullmatch(r"(.*?)(?:=(\d+))?\s*", rest)
        conn.address_given = (match.group(1), int(match.group(2)) if match.group(2) else None)
        conn.host, conn.epoch = conn.address_given
        return None

    def greet(self, conn, name, created, again):
        conn.write(self.MOTD.encode())                          # these two with LF in every build
        # this very one
        conn.write(b"Last connect was from %s on %s\n\n" % (
            conn.host.encode(), self.date().encode()))
        for text in ("MAIL: You have 0 messages.\n", "\n", self.look_text(name)):
            self._player(name, text)

    def announce(self, name, text):
        self._broadcast(text)

    def game(self, conn, line):
        if line.strip(" "):
            self.play(conn, line)

    def do_quit(self, conn, rest):
        conn.write(b"\n")
        conn.finish()

    def do_who(self, conn, rest):
        wizard = conn.player and self.is_wizard(conn.player)
        head = "Player Name        On For Idle  " + (
            "Loc Port Hostname\r\n" if wizard else " @doing\r\n")
        rows = []
        for c in self.online():
            seconds = time.time() - c.epoch if c.epoch else time.monotonic() - c.opened
            on_for = "%02d:%02d" % divmod(int(seconds) // 60, 60)
            rows.append("%-19s %s   0s  %s\r\n" % (
                c.player, on_for, "#1  %-4d %s" % (c.id, c.host) if wizard else ""))
        conn.tell(head + "".join(rows) + "%d Players logged in.\r\n" % len(rows))

    def do_password(self, conn, rest):
        match = re.fullmatch(r" *([^ =]+) *= *([^ ]+) *", rest)
        if not match:
            return conn.tell("usage: @password <old_password> = <new_password>\n")
        if match.group(1) != self.players[conn.player]:
            return conn.tell("Invalid old password.\n")
        self.players[conn.player] = match.group(2)
        return conn.tell("Password changed.\n")

    TEXTS = {"name": "Set.\n", "taken": "That name is already in use\n",
             "bad name": "That name is already in use\n"}

    def new_name(self, conn, new):
        return new

    def _boot(self, name, by, quiet):
        self._player(by, "You @booted %s%s off!\n" % (name, self.tag(name)))
        for conn in self.online(name):
            conn.tell("%s has @booted you.\n" % by)
            self._others(by, "%s has been @booted.\n" % name)
            conn.finish()

    def _shutdown(self, by, delay):
        """The heartbeat first, then the whole server asleep for 2 s (connects succeed and are
        silent), then everybody.
        """
        self._boot("heartbeat", by, False)
        self._asleep = True
        self._watch_all()
        self._at(delay, self._shutdown_rest, by)

    def _shutdown_rest(self, by):
        self._broadcast("TeenyMUSH has been sHutdown by %s%s.\n" % (by, self.tag(by)))
        for name in list(dict.fromkeys(c.player for c in self.online())):
            self._boot(name, by, False)
        self._clean_exit()


# ---- What the four C servers share

class CMush(Mush):
    """What the four C servers share: OUTPUTPREFIX/SUFFIX, commands of the login screen, the quota.
    """
    QUOTA = True
    ERASERS = {8: b" \b", 127: b"\b \b"}
    DROPPED = bytes(n for n in range(32) if n not in b"\b\n")
    SCREEN = ("QUIT", "LOGOUT", "WHO", "DOING", "SESSION", "INFO", "OUTPUTPREFIX", "OUTPUTSUFFIX",
              "PUEBLOCLIENT")
    # at the login screen; these also in the game:
    WRAPPED = ("WHO", "DOING", "SESSION", "INFO")
    WRAPPED_GAME = SCREEN
    LOGIN_ANY_CASE, GAME_ANY_CASE, QUOTED_NAMES, RETRIES, FINAL_MAIL = False, True, True, 3, ""
    NULL_PASSWORD = ""
    # TinyMUSH, RhostMUSH: the leaving of each is told the rest
    BYE, ANNOUNCES_DOWN = "Going down - Bye\r\n", False
    WHO_LOGIN = WHO_GAME = "Player Name        On For Idle  Doing\r\n"
    SESSION = (" " * 36 + "Characters Input----  Characters Output---\r\n"
               "Player Name        On For Idle Port Pend  Lost     Total  Pend  Lost     Total\r\n")
    TAKEN = "Either there is already a player with that name, or that name is illegal.\r\n"
    SHUTDOWN_TEXT, INFO_VERSION, MAX_LOGIN = "GAME: Shutdown by {by}\r\n", "1", 8000
    TEXTS = {"password": "Password changed.\r\n", "wrong old": "Sorry.\r\n",
             "empty": "Null passwords are not allowed.\r\n",
             "blank": "Illegal character in password.\r\n", "name": "Name set.\r\n",
             "taken": "That name is already in use.\r\n",
             "bad name": "You can't use that name.\r\n"}
    ALREADY = ("**** {0} failed connect{1} since your last successful connect. ****\r\n"
               "Most recent attempt was from {2} on {3}.\r\n")

    # -- the commands that exist at the login screen and in the game --

    def screen_command(self, line, in_game):
        """(name, argument) of a command of the login screen, or None."""
        word, rest = first_word(line, " ")
        if word != line[:len(word)]:
            return None
        name = word.upper() if (self.GAME_ANY_CASE if in_game else self.LOGIN_ANY_CASE) else word
        return (name, rest) if name in self.SCREEN else None

    def login_screen(self, conn, line):
        found = self.screen_command(line, False)
        if not found:
            return self.login(conn, line)
        with self.wrapped(conn, found[0] in self.WRAPPED):
            self.screen(conn, *found)

    def game(self, conn, line):
        found = self.screen_command(line, True)
        with self.wrapped(conn, not found or found[0] in self.WRAPPED_GAME):
            if found:
                self.screen(conn if found[0] in ("QUIT", "LOGOUT") else self.acted_on(conn), *found)
            else:
                self.play(conn, line)

    @contextlib.contextmanager
    def wrapped(self, conn, yes):
        """The prefix as it was before the command, the suffix as it is behind it.

        Of the typing connection.
        """
        conn.tell(conn.prefix + "\r\n" if yes and conn.prefix else "")
        yield
        conn.tell(conn.suffix + "\r\n" if yes and conn.suffix else "")

    def acted_on(self, conn):
        return conn

    def screen(self, conn, name, rest):
        if name in ("OUTPUTPREFIX", "OUTPUTSUFFIX"):
            setattr(conn, name[6:].lower(), rest.strip(" "))
        elif name in ("WHO", "DOING"):
            conn.tell(self.who(conn))
        elif name in ("QUIT", "LOGOUT", "SESSION", "INFO", "IDLE"):
            getattr(self, "screen_" + name.lower())(conn, rest)
        else:
            self.setting(conn, name, rest.strip(" "))

    def setting(self, conn, name, rest):
        conn.settings[name] = rest

    def screen_quit(self, conn, rest):
        conn.finish((self.QUIT_TEXT + self.last_mail(conn)) if conn.player else "")

    def last_mail(self, conn):
        return self.FINAL_MAIL if len(self.online(conn.player)) == 1 else ""

    def screen_logout(self, conn, rest):
        if not conn.player:
            return self.logout_again(conn)
        conn.tell(self.LOGOUT_TEXT + self.last_mail(conn))
        self._leave(conn)
        conn.prefix, conn.suffix, conn.failures = "", "", 0
        return conn.tell(self.BANNER)

    def logout_again(self, conn):
        conn.finish()

    def screen_idle(self, conn, rest):
        pass

    def screen_info(self, conn, rest):
        conn.tell("### Begin INFO %s\r\n%sUptime: %s\r\nConnected: %d\r\n"
                  "Size: %d\r\nVersion: %s\r\n### End INFO\r\n" % (
            self.INFO_VERSION, self.INFO_NAME, time.ctime(self.start_id), len(self.online()),
            len(self.players) + 2, self.INFO_TAIL))

    def screen_session(self, conn, rest):
        rows = ["%-19s 00:00   0s %4d    0     0 %9d     0     0 %9d\r\n" % (
            c.player, c.id, len(c.raw), 1) for c in self.online()]
        conn.tell(self.SESSION + "".join(rows) + self.count(len(rows)))

    def who(self, conn):
        """Wizards and the login screen see other columns.

        What a proxy needs is a list and its last line.
        """
        rows = []
        for c in reversed(self.online()):
            on_for = "00:%02d" % ((time.monotonic() - c.opened) // 60)
            where = " #0          0   " + c.host if conn.player and self.is_wizard(
                conn.player) else ""
            rows.append("%-19s %s   0s %s\r\n" % (c.player, on_for, where))
        return (self.WHO_GAME if conn.player
                else self.WHO_LOGIN) + "".join(rows) + self.count(len(rows))

    def count(self, players):
        return "%d Player%s logged in, %d record, no maximum.\r\n" % (
            players, "" if players == 1 else "s", max(players, 1))

    # -- login --

    def login(self, conn, line):
        word, rest = first_word(line)
        kind = self.login_verb(word) if len(line) <= self.MAX_LOGIN else None
        if not kind:
            return self.unknown(conn)
        name, password = self.credentials(rest)
        if kind == "create":
            return self.try_create(conn, name, password)
        return self.try_connect(conn, name, password, kind == "dark")

    def login_verb(self, word):
        """TinyMUSH and TinyMUX: case sensitive, and only the first two letters count."""
        return {"co": "connect", "cd": "dark", "cr": "create"}.get(word[:2])

    def unknown(self, conn):
        conn.tell(self.BANNER)

    def credentials(self, text):
        if self.QUOTED_NAMES and text.startswith('"'):
            name, rest = self.quoted(text.lstrip('" \t'))
        else:
            name, rest = first_word(text)
        return " ".join(name.split()), first_word(rest)[0]

    def quoted(self, text):
        """(name, rest) behind the opening quotes; any number of quotes closes it."""
        name, _, rest = text.partition('"')
        return name, rest.lstrip('"')

    def failure(self, conn, name):
        conn.failures += 1
        conn.tell(self.FAILED + "\r\n")
        if conn.failures >= self.RETRIES:
            conn.finish()

    def try_create(self, conn, name, password):
        if self.logins_disabled and self.refused(conn):
            return
        if not password:
            conn.tell(self.NULL_PASSWORD or self.TAKEN)
        elif self.find(name) or not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_' -]*", name):
            conn.tell(self.TAKEN)
        elif not self.refused(conn):
            self.players[name] = password
            self.number(name)
            self.welcome(conn, name, True)

    def failed_text(self, name):
        """N failed connects: shown at the next success."""
        if name not in self.failed:
            return ""
        count, host, date = self.failed[name]
        return self.ALREADY.format(count, "" if count == 1 else "s", host, date)

    def last_text(self, name):
        """Not at a player's first login, so it is no sign of success."""
        return "Last connect was from %s on %s.\r\n" % self.last_seen[
            name] if name in self.last_seen else ""

    def greet(self, conn, name, created, again):
        conn.tell(self.NEWUSER if created else self.motd(name, again))
        # the character's other connections see it too
        self._player(name, self.login_text(conn, name))
        self._player(name, self.look_text(name))

    # -- leaving and dying --

    def _boot(self, name, by, quiet):
        for conn in self.online(name):
            conn.tell("" if quiet else self.BOOTED.format(by=by))
            conn.finish(self.QUIT_TEXT + self.last_mail(conn))

    def _shutdown(self, by, delay):
        """The same farewell as a QUIT gives: text does not tell them apart."""
        self._broadcast(self.SHUTDOWN_TEXT.format(by=by))
        for conn in list(self.connections):
            conn.tell(self.BYE + (self.DOWN_TEXT + self.last_mail(conn) if conn.player else ""))
            conn.player = conn.player if self.ANNOUNCES_DOWN else None
            conn.finish()
        self._clean_exit()


# ---- PennMUSH

class PennMUSH(CMush):
    """Silent for a second, negotiates after the first IAC, takes a user's address on its unix
    socket.
    """
    family, BACKLOG, FIRST_NUMBER, PACE = "pennmush", 5, 4, (0.0025, 0)
    BANNER = (
        "<This is where you announce that they've connected to your MUSH>\r\n"
        "<It's a good idea to include the version/patchlevel of MUSH you're running>\r\n"
        "<It's a good idea to include an email address for questions about the MUSH>\r\n" +
        "-" * 77 + "\r\n"
        "Use create <name> <password> to create a character.\r\n"
        "Use connect <name> <password> to connect to your existing character.\r\n"
        "Use 'ch <name> <pass>' to connect hidden, and cd to connect DARK (admin)\r\n"
        "Use QUIT to logout.\r\n"
        "Use the WHO command to find out who is online currently.\r\n" + "-" * 77 + "\r\n"
        "Yell at your local god to personalize this file!\r\n\r\n")
    MOTD = ("Welcome to PennMUSH!\r\n" + "-" * 74 +
            "\r\nYell at your god to personalize this file\r\n\r\n")
    WIZMOTD = "Wizards, tell your friendly neighborhood god to personalize this file!\r\n\r\n"
    NEWUSER = ("-" * 73 +
               "\r\nCongratulations on your newly created character. PennMUSH welcomes you.\r\n")
    DOWN = ("*" * 75 +
            "\r\nThere has been an emergency which necessitated the disabling of non-wizard\r\n"
            "logins.  Please be patient, and you will be re-allowed to login as soon\r\n"
            "as the emergency has been controlled.  Thank you.\r\n" + "*" * 75 + "\r\n\r\n")
    FULL = ("The maximum number of players this game can support are currently\r\n"
            "logged in. Please try back in a few minutes.\r\n")
    LOCKED = "This IP address has failed too many times. Please try again in 10 minutes.\r\n"
    QUIT_TEXT = LOGOUT_TEXT = ("Thank you for visiting.\r\n\r\nPlease return soon.\r\n\r\n"
                               "*********** D I S C O N N E C T E D ***********\r\n\r\n")
    DOWN_TEXT, BOOTED = "", "You are politely shown to the door.\r\n"
    ENDS, DROPPED, ERASERS, MAX_LINE = b"\r\n", b"", {8: b""}, 4095
    OFFERS = offer((DO, TTYPE), (DO, NAWS), (WILL, CHARSET), (WILL, MSSP), (WILL, GMCP))
    ANSWERS = {(WILL, TTYPE): SEND_TTYPE, (DO, TTYPE): SEND_TTYPE,
               (WILL, LINEMODE): sub(LINEMODE, b"\x01\t"), (DO, LINEMODE): sub(LINEMODE, b"\x01\t"),
               (DO, 3): offer((WILL, 3), (DO, 3)), (WILL, 3): b"",
               (DO, CHARSET): sub(CHARSET, b"\x01;UTF-8;UTF-8;US-ASCII;ASCII;x-penn-def"),
               (WILL, CHARSET): b"", (DO, MSSP): "mssp", (WILL, MSSP): "mssp", (DO, NAWS): b"",
               (WILL, NAWS): b"", (DO, GMCP): b"", (WILL, GMCP): b""}
    MSSP_PAIRS = ("\x01NAME\x02PennMUSH\x01PLAYERS\x02{players}\x01UPTIME\x02{uptime}"
                  "\x01PORT\x02{port}\x01PUEBLO\x020\x01CODEBASE\x02PennMUSH 1.8.8p0"
                  "\x01FAMILY\x02TinyMUD\x01ANSI\x021\x01XTERM 256 COLORS\x021")
    RESTART = (0.16,
               "GAME: Reboot w/o disconnect by {by}, please wait.\r\n"
               "GAME: Saving database. Game may freeze for a few moments.\r\n"
               "GAME: Save complete. \r\n", "GAME: Reboot finished.\r\n", False, b"")
    ROOM = ("\x1b[1mRoom Zero\x1b[0m(#0RL)\r\nYou are in Room Zero.\r\n",) * 2
    FLAGS, THING, CONTENTS = ("PenAc", "PWenAc"), "\x1b[1m%s\x1b[0m%s\r\n", "Contents:\r\n"
    EXACT = ("QUIT", "LOGOUT", "INFO")
    SCREEN = EXACT + ("WHO", "DOING", "SESSION", "IDLE", "OUTPUTPREFIX", "OUTPUTSUFFIX", "SOCKSET",
                      "SCREENWIDTH", "SCREENHEIGHT", "PROMPT_NEWLINES", "PUEBLOCLIENT")
    WRAPPED_GAME = CMush.WRAPPED
    WHO_LOGIN = "Player Name          On For   Idle  Doing\r\n"
    WHO_GAME = "Player Name       Loc #    On For  Idle  Cmds Des  Host\r\n"
    SESSION = "Player Name       Loc #    On For  Idle  Cmds  Des    Sent    Recv    Pend\r\n"
    INFO_VERSION, INFO_NAME = "1.1", "Name: PennMUSH\r\nAddress: \r\n"
    INFO_TAIL = "PennMUSH 1.8.8p0"
    FUNCTIONS = Mush.FUNCTIONS + ["checkpass", "decode64"]
    NO_PLAYER, GOT_ARGUMENTS = "#-1 NO SUCH PLAYER", "BUT GOT %d"
    TEXTS = {"password": "You have changed your password.\r\n",
             "wrong old": "The old password that you entered was incorrect.\r\n",
             "empty": "Bad new password.\r\n", "blank": "Bad new password.\r\n",
             "name": "Name set.\r\n", "taken": "You can't give a player that name or alias.\r\n",
             "bad name": "You can't give a player that name or alias.\r\n"}
    NULL_PASSWORD = "The password is invalid (or missing).\r\n"
    TAKEN = "There is already a player with that name.\r\n"
    SOCKSET_ANSWERS = {"NOQUOTA": "NOQUOTA turned on. Command quota is now ignored.\r\n",
                       "PROMPT_NEWLINES": "No newline will be sent after a prompt.\r\n"}

    def __init__(self, *args, **quirks):
        self._unnamed = []          # accepted sockets whose addresses are being looked up
        super().__init__(*args, **quirks)

    def quoted(self, text):
        """One quote closes a name, right behind it: behind a blank it begins the password."""
        name, quote, rest = text.partition('"')
        return (name, quote + rest) if name.endswith(" ") else (name, rest)

    # -- connecting: the silent start, the unix socket's address line, telnet only where it is
    # looked for --

    def _adopt(self, sock):
        """Its slave looks the address up first; meanwhile all others are served."""
        seconds = self.look_up()
        if not seconds:
            return super()._adopt(sock)
        self._unnamed.append(sock)
        return self._at(seconds, self._named, sock)

    def _named(self, sock):
        self._unnamed.remove(sock)
        super()._adopt(sock)

    def _die(self, reset=False):
        super()._die(reset)
        while self._unnamed:
            self._unnamed.pop().close()

    def connected(self, conn):
        self._at(self.silent_start, self._ask_telnet, conn)
        self._at(2 * self.silent_start, self._greeting, conn)

    def _ask_telnet(self, conn):
        if self.telnet and not conn.telnet_ok and not conn.gone:
            conn.telnet_ok = True
            conn.write(offer((DO, LINEMODE)))

    def _greeting(self, conn):
        if not conn.greeted:
            self._ask_telnet(conn)
            conn.greeted = True
            conn.tell("" if self.silent_banner else self.BANNER)

    def received(self, conn, data):
        first = conn.local and not conn.proxied
        if first:
            conn.proxied = conn.spoken = True
            data = self._address_line(conn, data)
        if not data:
            return
        if not conn.spoken and data[0] == IAC and self.telnet:
            # telnet as the very first bytes; after a line only once it was asked for
            conn.telnet_ok = True
        conn.spoken = True
        lines = []
        self._read_packet(conn, data, lines)
        self.arrived(conn, lines)

    def _read_packet(self, conn, data, lines):
        """Nothing of a telnet sequence is remembered over the end of a packet."""
        at = 0
        while at < len(data):
            if data[at] != IAC or not self.telnet:
                self.byte(conn, data[at], lines)
                at += 1
            elif not conn.telnet_ok:
                self.stray(conn, data[at + 1:at + 2])
                at += 2
            else:
                at = self._sequence(conn, data, at + 1)

    def stray(self, conn, byte):
        """It is stored, and not acted on: no line end, no eraser."""
        self.store(conn, b"?" if byte in (b"", b"\b", b"\r", b"\n", b"\xff") else byte)

    def _sequence(self, conn, data, at):
        """Handle what is behind an IAC; returns where to go on."""
        verb = data[at:at + 1]
        if verb in (b"\xf1", b"\xf6"):
            self.telnet_command(conn, verb[0])
        elif verb and verb[0] in VERBS:
            if len(data) > at + 1:
                self.negotiate(conn, verb[0], data[at + 1])
            return at + 2
        elif verb == bytes((SB,)):
            return self._sub(conn, data, at + 1)
        else:
            self.stray(conn, verb)
        return at + 1

    def _sub(self, conn, data, at):
        body = re.compile(rb"((?:[^\xff]|\xff\xff)*)(\xff\xf0|\xff?)", re.S).match(data, at)
        if body.group(2) == b"\xff\xf0":
            self.subnegotiation(conn, body.group(1).replace(b"\xff\xff", b"\xff"))
        elif body.group(2) and body.end() < len(data):
            self.stray(conn, data[body.end():body.end() + 1])
            return body.end() + 1
        return body.end()

    def end_line(self, conn, lines):
        line = b"".join(conn.partial).partition(b"\0")[0]
        conn.partial.clear()
        if line:
            lines.append(line)

    def _address_line(self, conn, data):
        """IP^HOST\\r\\n at once and in one piece; returns what is left as input."""
        conn.host = conn.ip = "(Unknown)"
        if time.monotonic() - conn.opened > self.address_window:
            return data
        if len(data) <= 4:
            conn.finish()
            return b""
        data = data.partition(b"\0")[0]         # a NUL (NAWS holds one) cuts off all that follows
        line, _, rest = data.partition(b"\r\n")
        ip, caret, host = line.partition(b"^")
        if caret and not host:
            conn.finish()
        elif caret:
            conn.ip, conn.host = ip.decode("latin-1"), host[:99].decode("latin-1")
            conn.address_given = (conn.ip, conn.host)
        return rest

    def negotiate(self, conn, verb, option):
        self._offer(conn)
        if (verb, option) == (DO, CHARSET) and conn.utf8:
            # after 68 kB of its own memory
            raise Deadly("DO CHARSET behind CHARSET ACCEPTED UTF-8")
        super().negotiate(conn, verb, option)

    def repeat_offers(self):
        """It offers again on its connections' telnet (worlds/pennmush.md h)."""
        self._do(lambda: [conn.write(self.OFFERS) for conn in self.connections if conn.offered])

    def telnet_command(self, conn, command):
        self._offer(conn)
        if command == AYT:
            conn.write(b"\r\n*** AYT received, I'm here ***\r\n")

    def _offer(self, conn):
        if not conn.offered:
            conn.offered = True
            conn.write(self.OFFERS)

    def decode(self, conn, line):
        """What is not printable in the locale is ?, one a byte.

        After CHARSET UTF-8 a character is spelled in ASCII.
        """
        if not conn.utf8:
            return re.sub("[^ -~]", "?", line.decode("latin-1"))
        return "".join(self.SPELLED.get(c) or (c if " " <= c <= "~" else "?")
                       for c in line.decode("utf-8", "replace"))

    # some of its table
    SPELLED = {"\u0130": "I", "\u0391": "A", "\u041e": "O", "\u010d": "c", "\u0416": "Zh",
               "\u0429": "Shch", "\ufb00": "ff", "\u201c": '"', "\u201d": '"', "\u2018": "'",
               "\u2026": "...", "\u2014": "--"}

    # -- commands --

    def command(self, conn, line):
        if not line.startswith("IDLE"):
            self._greeting(conn)                # any other line cuts the silent start
        super().command(conn, line)

    def screen_command(self, line, in_game):
        for name in self.SCREEN:
            if line == name or name not in self.EXACT and line.startswith(name):
                return name, line[len(name):]
        return None

    def screen_idle(self, conn, rest):
        conn.tell(re.sub("^ ", "", rest) + "\r\n" if rest else "")

    def screen_quit(self, conn, rest):
        goodbye = sub(GMCP, b"Core.Goodbye") if "DO" in conn.options.get(GMCP, ()) else b""
        conn.tell(self.QUIT_TEXT if conn.player else "")
        conn.write(goodbye)
        conn.finish()

    def logout_again(self, conn):
        conn.tell(self.BANNER)

    def screen_session(self, conn, rest):
        if not conn.player:
            return conn.tell(self.who(conn))
        rows = ["%-19s  #0        0s    0s     1 %3d     100     100       0\r\n" % (c.player, c.id)
                for c in self.online()]
        return conn.tell(self.SESSION + "".join(rows) + self.count(len(rows)))

    def setting(self, conn, name, rest):
        """SOCKSET holds several, told apart by their names; alone it lists them. It answers."""
        if name != "SOCKSET":
            return super().setting(conn, name, rest)
        option, equals, value = rest.upper().partition("=")
        if not equals:
            return conn.tell(
                "\r\n" + "".join("%-15s:  %s\r\n" % item for item in sorted(conn.settings.items())))
        if option == "NOQUOTA" and not (conn.player and self.is_wizard(conn.player)):
            return None
        conn.settings[option] = value
        return conn.tell(self.SOCKSET_ANSWERS.get(option, ""))

    def count(self, players):
        return {0: "There are no players connected.\r\n",
                1: "There is 1 player connected.\r\n"}.get(
            players, "There are %d players connected.\r\n" % players)

    def login(self, conn, line):
        if not line.strip(" "):
            # a line of blanks is silent here and wrapped in the game
            return
        failures = [t for t in self.ip_failures.get(conn.ip, ()) if time.monotonic() - t < 600]
        if len(failures) >= 10:                 # whatever it says and whoever it is
            return conn.tell(self.LOCKED)
        return super().login(conn, line)

    def login_verb(self, word):
        forms = (("connect", "connect"), ("cd", "dark"), ("ch", "dark"), ("cv", "connect"),
                 ("create", "create"))
        return next((kind for full, kind in forms if word and full.startswith(word.lower())), None)

    def try_connect(self, conn, name_text, password, dark=False):
        if not name_text:
            return conn.tell(self.FAILED + "\r\n")
        return super().try_connect(conn, name_text, password, dark)

    def failure(self, conn, name):
        self.ip_failures.setdefault(conn.ip, []).append(time.monotonic())
        conn.tell("That is not the correct password.\r\n" if name
                  else "There is no player with that name.\r\n")

    def refused(self, conn):
        text = self.DOWN if self.logins_disabled else self.FULL if self.full() else ""
        if text:
            conn.finish(text)
        return bool(text)

    def motd(self, name, again):
        """A wizard gets in while logins are disabled, and sees what the others are told."""
        full = self.max_players is not None and len(self.online()) > self.max_players
        warning = self.DOWN if self.logins_disabled else self.FULL if full else ""
        return warning + (
            "" if again else self.MOTD + (self.WIZMOTD if self.is_wizard(name) else ""))

    def login_text(self, conn, name):
        host, date = self.last_seen.get(name, ("None", time.ctime(self.start_id)))
        failed = "Last FAILED connect was from %s on %s.\r\n" % self.failed[name][
            1:] if name in self.failed else ""
        return (" \r\nLast connect was from %s on %s.\r\n%s\r\n\r\n"
                "MAIL: You have no mail.\r\n\r\n" %
                (host, date, failed))

    def _leave(self, conn):
        if conn.player and len(self.online(conn.player)) > 1:
            for other in self.online(conn.player):
                other.tell("" if other is conn else "MAIL: Mailbox purged.\r\n")
        super()._leave(conn)

    # -- in the game --

    def play(self, conn, line):
        return super().play(conn, line) if line.strip(" ") else None

    def verb(self, word):
        """Unique prefixes work."""
        is_short = len(word) > 2 and "@password".startswith(word.lower())
        return super().verb("@password" if is_short else word)

    def new_name(self, conn, new):
        return super().new_name(conn, new.strip('"').partition(";")[0])


# ---- TinyMUSH, TinyMUX, RhostMUSH

class TinyMUSH(CMush):
    """TinyMUSH 4: sub-negotiations leak into the line, a refused login restarts the game, kill -9
    loses nothing.
    """
    family, HOST, BACKLOG, FIRST_NUMBER, PACE = "tinymush", "localhost", 5, 3, (0.002, 0.0012)
    KEEPS_PLAYERS = ANNOUNCES_DOWN = True
    BANNER = (
        "This world is Pueblo 1.0 enhanced\r\n\r\nWelcome to TinyMUSH\r\n" + "-" * 78 + "\r\n"
        '  "connect <name> <password>"   connects you to an existing character.\r\n'
        '  "create <name> <password>"    creates a new character.\r\n'
        '  "WHO"    tells you who is logged in to the game (case sensitive).\r\n'
        '  "QUIT"   exits the game and saves your character.\r\n'
        '  "news"   informs you about recent program changes and items of interest.\r\n'
        '  "help"   gives help on the commands, "help commands" for a list.\r\n' + "-" * 78 +
        "\r\n")
    MOTD = "There is no Message of The Day today.\r\n\r\n### end of messages ###\r\n"
    NEWUSER = "Welcome to the world of TinyMUSH.  Explore places.  Meet people.  Have fun!\r\n"
    QUIT_TEXT = DOWN_TEXT = "*** TinyMUSH Disconnected ***\r\n"
    LOGOUT_TEXT, BOOTED = "", "{by} gently shows you the door.\r\n"
    ENDS, ERASERS, MAX_LINE = b"\r\n", {127: b"\b \b"}, 16375
    DROPPED = bytes(n for n in range(256) if n < 32 and n not in (7, 9, 10, 13, 27) or n > 127)
    ANSWERS = {(DO, 0): b"", (DO, 3): b"", (DO, LINEMODE): offer((WILL, LINEMODE)),
               (WILL, 1): offer((DO, 1))}
    RESTART = (0.03, "GAME: Restart by {by}, please wait.\r\n", "GAME: Restart finished.\r\n",
               False, b"")
    ROOM = ("Limbo\r\nYou see nothing special.\r\n", "Limbo(#0R)\r\nYou see nothing special.\r\n")
    FLAGS, THING, CONTENTS = ("Pc", "PWc"), "%s%s\r\n", "Contents:\r\n"
    SCREEN = CMush.SCREEN + ("IDLE",)
    WRAPPED_GAME = CMush.SCREEN
    WHO_GAME = "Player Name        On For Idle   Room    Cmds   Host\r\n"
    INFO_NAME, INFO_TAIL = "Name: AnonyMUSH\r\n", "4.0.0.817-0"
    FUNCTIONS = Mush.FUNCTIONS + ["hasflag"]
    MORE_GAME, MAX_LOGIN = {"@pass": "password"}, 512
    ALREADY = "\r\n" + CMush.ALREADY + "\r\n"

    def received(self, conn, data):
        """Nothing is put together over reads."""
        conn.telnet_state = "text"
        super().received(conn, data)

    def _telnet_iac(self, conn, byte, text):
        """Sub-negotiations are not known: what is inside is text."""
        if byte == SB:
            conn.telnet_state = "text"
        else:
            super()._telnet_iac(conn, byte, text)

    def decode(self, conn, line):
        return line.decode("ascii")

    def encode(self, conn, text):
        return text.encode("ascii", "ignore")

    def screen_command(self, line, in_game):
        if line == "IDLE":
            return "IDLE", ""
        found = super().screen_command(line, in_game)
        return found if found and found[0] != "IDLE" else None

    def acted_on(self, conn):
        """In the game these act on the character's most recently used connection: whole seconds,
        newest login wins.
        """
        return max(self.online(conn.player), key=lambda c: (c.used, c.login_number))

    def refused(self, conn):
        """A refusal crashes it: it restarts in place, settings as in its conf file.

        The refused user sees nothing.
        """
        if not self.logins_disabled and not self.full():
            return False
        self.segv()
        return True

    def segv(self):
        self._do(self._segv)

    def _segv(self):
        self._broadcast("GAME: Fatal signal SIGSEGV caught, restarting with previous database.\r\n")
        self.logins_disabled, self.max_players = False, None
        self._asleep = True
        self._watch_all()
        self._at(0.03, self._restarted, self.RESTART[2], False, b"")

    def motd(self, name, again):
        return self.MOTD + ("Welcome, wizard.\r\n\r\n" if self.is_wizard(name) else "")

    def login_text(self, conn, name):
        return "MAIL: You have no mail.\r\n" + self.failed_text(name) + self.last_text(name)


class TinyMUX(CMush):
    """TinyMUX 2.12: offers telnet at once, characters depend on CHARSET."""
    family, BACKLOG, FIRST_NUMBER, GHOSTS = "tinymux", 4096, 12, True
    BANNER = (
        "Welcome to TinyMUX\r\n" + "-" * 78 + "\r\n"
        '  "connect <name> <password>" connects you to an existing character.\r\n'
        '  "connect guest" connects you to a guest account if one is prepared.\r\n'
        '  "create <name> <password>" creates a new character.\r\n\r\n'
        '  "WHO" tells you who is logged in to the game (case sensitive).\r\n'
        '  "QUIT" exits the game and saves your character.\r\n\r\n'
        '  Once logged on, "help" gives help on specific commands, functions, and\r\n'
        "  special topics.  Other 'help' commands include \"+help\" and \"news\".\r\n" + "-" * 78 +
        "\r\n")
    NEWUSER = ("Welcome to the world of TinyMUX.  Explore places.  Meet people.  Have fun!\r\n" +
               "-" * 78 + "\r\n")
    QUIT_TEXT = DOWN_TEXT = "*** TinyMUX Disconnected ***\r\n"
    LOGOUT_TEXT, FINAL_MAIL = "", "MAIL: Mailbox purged.\r\n"
    BOOTED = "{by} gently shows you the door.\r\n"
    ON_CONNECT = (offer((WILL, 25), (DO, 25), (DO, 3), (DO, TTYPE), (DO, NAWS), (DO, 39),
                        (WILL, CHARSET), (DO, CHARSET)),)
    BINARY = offer((WILL, 0), (DO, 0))
    ANSWERS = {(WILL, TTYPE): SEND_TTYPE, (WILL, 39): b"\xff\xfa\x27\x01\x00\x03\xff\xf0",
               (WILL, NAWS): b"", (WILL, 3): b"", (DO, 25): b"", (WILL, 25): b"",
               (DO, 0): offer((WILL, 0)), (WILL, 0): offer((DO, 0)), (WILL, CHARSET): b"",
               (DO, CHARSET): sub(CHARSET, b"\x01;UTF-8;ISO-8859-1;ISO-8859-2;US-ASCII;CP437")}
    RESTART = (0.03, "GAME: Restart by {by}, please wait.\r\n", "GAME: Restart finished.\r\n",
               False, b"")
    ROOM = ("Limbo\r\n", "Limbo(#0R)\r\n")
    FLAGS, THING, CONTENTS = ("Pc", "PWc"), "%s%s\r\n", "Contents:\r\n"
    WHO_GAME = TinyMUSH.WHO_GAME
    INFO_VERSION, INFO_NAME = "1.1", "Name: TestMUX\r\n"
    INFO_TAIL = "MUX 2.12.0.10\r\nPatches: STUB_SLAVE"
    FUNCTIONS = Mush.FUNCTIONS + ["hasflag"]
    MAX_LOGIN, MAX_LINE = 400, 7990
    MORE_GAME = {"@pass": "password"}
    NULL_PASSWORD = "Null passwords are not allowed.\r\n"

    def date(self, when=None):
        """With a fraction: Sat Nov 21 23:16:57.301512 2026"""
        day, year = time.ctime(when).rsplit(" ", 1)
        return "%s.%06d %s" % (day, time.time() % 1 * 1000000, year)

    def received(self, conn, data):
        """A character set counts at once, in the middle of a line too."""
        lines = []
        for part in re.findall(rb"[^\xf0\xff]+|\xf0|\xff", data):
            self.read(conn, self._strip_telnet(conn, part) if self.telnet else part, lines)
        self.arrived(conn, lines)

    def byte(self, conn, byte, lines):
        if conn.utf8 and byte not in b"\r\n":
            return self._byte_of_utf8(conn, byte, lines)
        if byte >= 128 and byte in self.LOST.get(conn.charset, b""):
            return None
        if byte == 10:
            conn.begun = b""
        return super().byte(conn, byte, lines)

    LOST = {None: bytes.fromhex("8081888d8f9098999b9d"), "US-ASCII": bytes(range(128, 256)),
            "CP437": b"\xff", "ISO-8859-2": bytes(range(128, 160))}
    LOST["ISO-8859-1"] = LOST[None]
    LENGTHS = {**dict.fromkeys(range(0xc2, 0xe0), 2), **dict.fromkeys(range(0xe0, 0xf0), 3),
               0xf0: 4, 0xf3: 4}
    del LENGTHS[0xcc]                                   # only combining marks begin so

    def _byte_of_utf8(self, conn, byte, lines):
        begun, conn.begun = conn.begun, b""
        if byte in self.ERASERS:
            super().byte(conn, byte, lines)
        elif begun and 0x80 <= byte < 0xc0:
            conn.begun = begun + bytes((byte,))
            if len(conn.begun) == self.LENGTHS[begun[0]]:
                whole, conn.begun = conn.begun, b""
                if self._printable(whole):
                    self.store(conn, whole)
        elif begun:
            pass                                        # the byte goes with what it broke
        elif byte in self.LENGTHS:
            conn.begun = bytes((byte,))
        elif byte < 128:
            super().byte(conn, byte, lines)

    @staticmethod
    def _printable(whole):
        with contextlib.suppress(UnicodeDecodeError):
            return unicodedata.category(whole.decode("utf-8")) not in (
                "Cc", "Cf", "Cn", "Co", "Cs", "Mn", "Me", "Mc")
        return False

    def doubled(self, conn, text):
        text.append(IAC)

    def other_command(self, conn, byte, text):
        if byte == 247:
            text.append(8)                              # IAC EC
        super().other_command(conn, byte, text)

    def broken_sub(self, conn, byte, text):
        conn.telnet_state = "sub_lost"

    def _telnet_sub_lost(self, conn, byte, text):
        """All is ignored up to the next IAC, which is data."""
        if byte == IAC:
            conn.telnet_state = "sub"
            conn.telnet_sub.append(byte)

    CODECS = {"UTF-8": "utf-8", "CP437": "cp437", "ISO-8859-2": "iso8859-2", "US-ASCII": "ascii"}

    def decode(self, conn, line):
        return line.decode(self.CODECS.get(conn.charset, "cp1252"), "replace")

    def encode(self, conn, text):
        return text.encode("utf-8" if conn.utf8 else "latin-1", "replace")

    def subnegotiation(self, conn, body):
        before = conn.charset
        if len(body) > 62:
            return                                      # it looks at no longer ones
        super().subnegotiation(conn, body)
        if body[:2] == bytes((CHARSET, 1)):
            *names, _ = body[3:].split(body[2:3]) if len(body) > 2 else [b""]
            conn.charset = next((it.decode("latin-1") for it in names
                                 if self._is_charset(it.decode("latin-1"))), before)
        elif body[:2] == bytes((CHARSET, 3)):
            conn.charset = "US-ASCII"
        elif body[:2] in (bytes((39, 0)), bytes((39, 2))):
            conn.charset = "UTF-8" if self._locale_is_utf8(body[2:]) else before
        if not self._is_charset(conn.charset):
            conn.charset = before
        conn.utf8 = conn.charset == "UTF-8"
        old, new = (self.CODECS.get(name, "cp1252") for name in (before, conn.charset))
        # what stands in the line already are characters, not bytes
        if old != new:
            conn.begun = b""
            # ? stands for what has no byte now
            lost = self.LOST.get(conn.charset, b"")
            conn.partial = [it if it not in lost or len(it) > 1 else b"?" for it in (
                c.decode(old).encode(new, "replace") for c in conn.partial)]
        conn.write(self.BINARY if conn.utf8 and body[:1] == bytes((CHARSET,)) else b"")

    def _is_charset(self, name):
        return name == "UTF-8" or bool(name) and name in self.LOST

    @staticmethod
    def _locale_is_utf8(data):
        """Whether a variable says so; the mark that ends a value begins no other variable."""
        found, at = False, 0
        while at < len(data):
            at += 1
            if data[at - 1] not in (0, 3):
                continue
            name, value_mark, rest = data[at:].partition(b"\1")
            if not value_mark:
                break
            value = re.match(rb"[^\x00\x03]*", rest).group()
            at = len(data) - len(rest) + len(value) + 1
            locale = value.split(b".", 1)[-1].lower()
            found = found or name.split(b"\0")[0].lower() in (b"lang", b"lc_all",
                                                              b"lc_ctype") and locale == b"utf-8"
        return found

    def telnet_command(self, conn, command):
        conn.write(b"\r\n[Yes]\r\n" if command == AYT else b"")

    def login_name(self, text):
        return None if text.startswith("#") else self.find(text)

    def game(self, conn, line):
        super().game(conn, line.lstrip(" "))

    def new_name(self, conn, new):
        return super().new_name(conn, Softcode(self, conn).run(new))

    def try_connect(self, conn, name_text, password, dark=False):
        if name_text.lower() == "guest" and not self.guests:
            return conn.tell("Guest logins are disabled.\r\n")
        if self.logins_disabled and self.is_wizard(self.login_name(name_text)):
            conn.tell("*** Logins are disabled.\r\n")
        return super().try_connect(conn, name_text, password, dark)

    def refused(self, conn):
        if self.logins_disabled:
            text = "Sorry, logins are temporarily disabled.  Try again in a half hour or so.\r\n"
        elif self.full():
            text = ("Sorry, there are too many players connected right now.  Please try again\r\n"
                    "in a few minutes.\r\n")
        else:
            return False
        conn.finish("-" * 78 + "\r\n" + text)
        return True

    def motd(self, name, again):
        return ""

    def login_text(self, conn, name):
        return self.failed_text(name) + self.last_text(name) + "\r\nMAIL: You have no mail.\r\n\r\n"


class RealisticMUX(TinyMUX):
    """As the real one: BINARY is asked for once, and answers are not answered."""
    ANSWERS = {**TinyMUX.ANSWERS, (DO, 0): b"", (WILL, 0): b""}

    def subnegotiation(self, conn, body):
        again = conn.utf8
        World.subnegotiation(self, conn, body)
        conn.write(self.BINARY if conn.utf8 and not again else b"")


class RhostMUSH(CMush):
    """Negotiates after the client's first bytes.

    PROXY lines give the user's address, a second one is fatal for all.
    """
    family, HOST, BACKLOG, FIRST_NUMBER, PACE = "rhostmush", "localhost", 5, 2, (0.0078, 0)
    GHOSTS = ANNOUNCES_DOWN = True
    TOP = " " + "/~\\=" * 18 + "/~\\ \r\n"
    BOTTOM = " " + "\\_/=" * 18 + "\\_/\r\n  " + "~   " * 18 + "~  \r\n"
    BANNER = (
        " " * 27 + "Welcome to RhostMUSH\r\n\r\n" + TOP +
        "((  To create new character     ----------=>   create <player> <password>  ))\r\n"
        " )) To continue old character   ----------=>   connect <player> <password>(( \r\n"
        "((  To connect a guest          ----------=>   connect guest guest         ))\r\n"
        " )) To see who is on            ----------=>   WHO                        (( \r\n"
        "((  To quit your character      ----------=>   QUIT                        ))\r\n"
        " )) To get help once connected  ----------=>   help (i.e. : help commands)(( \r\n"
        "((" + " " * 73 + "))\r\n"
        " )) Note: use double quotes around name for names with spaces.            (( \r\n"
        '((  Example: cr "player with spaces" password                              ))\r\n' +
        BOTTOM)
    MOTD = ("/" * 78 + "\r\n" + "NOTICE " * 11 + "\r\n\r\n\t\t\t\t   No News.\r\n  \r\n" +
            " ".join(["NOTICE"] * 11) + "\r\n"
            + "/" * 78 + "\r\n")
    NEWUSER = (
        TOP + "((  Welcome to the world of RhostMUSH.  Explore places.  Meet people.      ))\r\n" +
        BOTTOM)
    QUIT_TEXT = DOWN_TEXT = (TOP + "((" + " " * 73 + "))\r\n ))" + " " * 19 +
                             "*** RhostMUSH Disconnected. ***" + " " * 21 +
                             "((\r\n((" + " " * 73 + "))\r\n" + BOTTOM)
    LOGOUT_TEXT, BOOTED = "", "{by} gently shows you the door.\r\n"
    SHUTDOWN_TEXT = "Game: Shutdown by {by}\r\n"
    OFFERS = (offer((DO, NAWS)), offer((DO, TTYPE)), sub(CHARSET, b"\x01 UTF-8"))
    ANSWERS = {(WILL, TTYPE): SEND_TTYPE, (WILL, NAWS): b"", (WILL, CHARSET): offer((DO, CHARSET))}
    RESTART = (0.04,
               "Game: Restart by {by}.\r\n"
               "Game: Your connection will pause, but will remain connected. Please wait...\r\n",
               "Game: New server image successfully loaded.\r\n", True, b"".join(OFFERS))
    ROOM = ("Limbo\x1b[0m\x1b[0m\r\n", "Limbo\x1b[0m(#0R)\x1b[0m\r\n")
    FLAGS, THING = ("P><^c", "PU><^c"), "%s\x1b[0m%s\x1b[0m\r\n"
    CONTENTS = "\x1b[1mContents:\x1b[0m\x1b[0m\r\n"
    WRAPPED_GAME = ("QUIT", "LOGOUT", "PUEBLOCLIENT") + CMush.WRAPPED
    LOGIN_ANY_CASE, QUOTED_NAMES, KEEPS_BRACES, EMPTY_PERCENTS = True, False, False, "$<c"
    WHO_LOGIN = "Player Name          On For Idle  Guild       Doing\r\n"
    WHO_GAME = "Player Name          On For Idle  Room     Ports Host\r\n"
    MAX_LINE = 16375
    INFO_NAME, INFO_TAIL = "Name: TestRhost\r\n", "RhostMUSH 5.8.4"
    FUNCTIONS = Mush.FUNCTIONS + ["checkpass"]
    NO_PLAYER, GOT_ARGUMENTS = "#-1 NO MATCH", "[RECEIVED %d]"
    ALREADY = " \r\n" + CMush.ALREADY + " \r\n"
    MORE_GAME = {"@pass": "password"}
    NULL_PASSWORD = "Invalid password specified.\r\n" + CMush.TAKEN
    TEXTS = dict(CMush.TEXTS, empty="Bad new password.\r\n", blank="Bad new password.\r\n")

    def received(self, conn, data):
        """Its telnet comes with the client's first bytes, in front of the first reply, in several
        writes.
        """
        if not conn.offered and self.telnet:
            conn.offered = True
            for part in self.OFFERS:
                conn.write(part)
        super().received(conn, data)

    def read(self, conn, text, lines):
        at = 0
        while at < len(text):
            at = self._character(conn, text, at, lines)

    def _character(self, conn, text, at, lines):
        """Read one character; returns where the next one is."""
        first = text[at]
        if first == IAC:
            after = text[at + 1:at + 2]
            self.store(conn, *(b"%", b"<", b"2", b"5", b"5", b">") if after in (b"", b"\xff")
                       else ())
            return at + 2
        length = (2 if 0xc0 <= first < 0xe0 else 3 if 0xe0 <= first < 0xf0 else
                  4 if 0xf0 <= first < 0xf8 else 0)
        rest = text[at + 1:at + length] if length else b""
        if length and len(rest) == length - 1 and all(0x80 <= byte < 0xc0 for byte in rest):
            value = first & (0xff >> (length + 1))
            for byte in rest:
                value = value * 64 + byte % 64
            known = {32: " ", 0x201c: '"', 0x201d: '"', 0x201f: '"', 0xff1a: ":"}
            self.store(conn, *[c.encode() for c in known.get(value) or "%%<u%04x>" % value])
            return at + length
        if first > 0xa0:
            self.store(conn, *[c.encode() for c in "%%<%d>" % first])
        elif first < 128:
            self.byte(conn, first, lines)
        return at + 1

    def decode(self, conn, line):
        """Its own spelling of characters is kept; the players of the tests have names and passwords
        in UTF-8.
        """
        def character(spelled):
            number = int(spelled.group(1), 16)
            return chr(number) if 0xa0 < number <= sys.maxunicode else spelled.group()
        return re.sub("%<u([0-9a-f]{4,6})>", character, line.decode("ascii"))

    def encode(self, conn, text):
        """Made ASCII on output: é becomes e, what has no base letter ?"""
        plain = unicodedata.normalize("NFKD", text)
        return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace")

    def login(self, conn, line):
        word, rest = first_word(line, " ")
        if len(line) > 2000:
            return conn.finish("Your attempt to crash this mush has been noted and logged.\r\n")
        if line[:1] == " ":                     # whatever the word
            return self.try_connect(conn, *self.credentials(rest)) if word else self.unknown(conn)
        secret = self.sconnect_cmd and word == self.sconnect_cmd
        if word == "PROXY" and self.proxy_enabled or secret:
            return self.proxy(conn, line, rest.split() if secret else rest.split()[1:])
        return super().login(conn, line)

    def proxy(self, conn, line, words):
        if not self.proxy_enabled:
            return conn.finish("SSL attempt to negotiate without SSL enabled.\r\n")
        if conn.proxied:
            self.forged.append((conn.id, line))
            # for everybody, until an admin sets sconnect_reip again
            self.proxy_enabled = False
            return conn.finish("SSL attempt to negotiate twice.\r\n")
        if not words:
            return None                         # PROXY UNKNOWN
        if not self.trusted_address:
            return conn.finish("SSL Connections are not allowed from your site.\r\n")
        conn.proxied = True
        conn.address_given = conn.host = conn.ip = words[0]
        time.sleep(self.look_up())              # nobody else is served meanwhile
        return self._show_banner(conn)

    def _show_banner(self, conn):
        """ssl_welcome 1: the banner waits for the PROXY line."""
        if not conn.greeted:
            conn.greeted = True
            conn.tell(self.BANNER)

    def login_verb(self, word):
        forms = (("connect", "connect"), ("cdark", "dark"), ("chide", "dark"), ("create", "create"))
        return next((kind for full, kind in forms if word and full.startswith(word.lower())), None)

    def try_connect(self, conn, name_text, password, dark=False):
        if len(password) >= 200:
            return conn.finish("Your attempt to crash this mush has been noted and logged.\r\n")
        if name_text.lower() == "guest" and not password:
            conn.tell("Use 'connect guest guest' to connect to a guest character.\r\n")
            return self.failure(conn, None)
        return super().try_connect(conn, name_text, password, dark)

    def refused(self, conn):
        refused = self.logins_disabled or self.full()
        if refused:
            conn.finish("Sorry, logins are temporarily disabled.\r\n" if self.logins_disabled
                        else "Sorry, the game is full.\r\n")
        return refused

    def motd(self, name, again):
        return self.MOTD + ("No current wizard motd news.\r\n" if self.is_wizard(name) else "")

    def login_text(self, conn, name):
        return self.failed_text(name) + self.last_text(name)

    def screen_session(self, conn, rest):
        if conn.player:                         # prints nothing at the login screen
            super().screen_session(conn, rest)

    def count(self, players):
        return "%d Player%s logged in. (Bummer.)\r\n" % (players, "" if players == 1 else "s")

    def play(self, conn, line):
        if line.strip(" ").lower().startswith("idle "):
            return conn.tell("A great book falls into your lap.  Its titled 'help'.\r\n")
        return super().play(conn, line)

    def new_name(self, conn, new):
        return "" if " " in new else super().new_name(conn, new)


WORLDS = {cls.family: cls for cls in (TeenyMUSH, PennMUSH, TinyMUSH, TinyMUX, RhostMUSH, Plain)}


# ---- The real TinyMUX: private copies of Debian's, each in a folder of its own

def poll_until(test, failure, interval=0.002):
    """Wait for something that sends no event; `failure()` says what went wrong."""
    deadline = time.monotonic() + RealMux.DEADLINE
    while not test():
        if time.monotonic() > deadline:
            raise TimeoutError(failure())
        time.sleep(interval)


class RealMux:
    """One TinyMUX server and its game folder; each start() makes a new process of it."""

    INSTALL = "/usr/games/tinymux-install"      # often not in PATH
    NETMUX = "/usr/lib/tinymux/game/bin/netmux"
    PLAYERS = {"heartbeat": "heartbeat", "Alice": "alicepw", "Bob": "bobpw", "Carol": "carolpw"}
    FAMILY = ("netmux", "slave", "stubslave")   # the server and the helpers it starts
    DEADLINE = 20                               # seconds; only a broken run waits so long

    @staticmethod
    def available():
        """Return None, or why TinyMUX cannot run here."""
        needed = (RealMux.INSTALL, RealMux.NETMUX, "/proc/self/cwd")
        missing = [path for path in needed if not os.path.exists(path)]
        return "no %s (apt-get install tinymux)" % ", ".join(missing) if missing else None

    def __init__(self, folder, port=0, players=None, conf=None, source=None):
        """Copy a game to folder/game, with `players` and netmux.conf lines `conf` added.

        `source`, the game folder of a server that is down, is copied instead of a fresh game.
        """
        if self.available():
            raise unittest.SkipTest(f"TinyMUX: {self.available()}")
        self.host = "127.0.0.1"
        self.port = port or Ports.free()
        self.address = "%s:%d" % (self.host, self.port)
        self.game = pathlib.Path(folder).resolve() / "game"
        self._server = None
        everybody = dict(self.PLAYERS, **(players or {}))
        shutil.copytree(source or self._prepared_game(tuple(everybody.items())), self.game,
                        symlinks=True, ignore=shutil.ignore_patterns("*.log", "*.pid"))
        with open(self.game / "netmux.conf", "a") as file:      # the last line on a key counts
            for option in {"port": self.port, "ip_address": self.host, **(conf or {})}.items():
                file.write("%s %s\n" % option)

    @staticmethod
    @functools.lru_cache(maxsize=None)
    def _prepared_game(players):
        """Make a game with these (name, password) pairs, once in this process, to be copied."""
        folder = tempfile.mkdtemp(prefix="realmux-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        subprocess.run([RealMux.INSTALL], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        maker = RealMux(folder, source=os.path.join(folder, "tinymux", "game"),
                        conf={"pcreate_per_hour": 10000})
        maker.start()
        limits = ["@admin command_quota_max=10000", "@admin command_quota_increment=10000"]
        answer = maker.command("\r\n".join(
            limits + ["@pcreate %s=%s" % pair for pair in players]))
        if answer.count("New player '") != len(players):
            raise RuntimeError("@pcreate: " + answer)
        # Wizard stands elsewhere, so that nobody in Limbo sees command() come and go.
        maker.command("@set *heartbeat=wizard\r\n@teleport me=#2\r\n@shutdown")
        maker.wait()
        return maker.game

    @property
    def pid(self):
        """The server's process id, None when it is not running."""
        running = self._server and self._server.poll() is None
        return self._server.pid if running else None

    def start(self):
        """Start the server (an @shutdown may still be going on); return when it serves."""
        self.launch()
        poll_until(self._answers, lambda: "TinyMUX does not answer\n" + self.log_tail())

    def launch(self):
        """Start the server's process."""
        self.wait()
        poll_until(lambda: self._port_is_free(self.port), lambda: "port %d is taken" % self.port)
        self._rotate_database()
        atexit.register(self.close)
        with open(self.game / "console.log", "ab") as console:
            self._server = subprocess.Popen(
                ["./bin/netmux", "-c", "netmux.conf", "-p", "netmux.pid", "-e", "."],
                cwd=self.game, env=dict(os.environ, LD_LIBRARY_PATH="./bin"),
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=console, stderr=console)

    def kill(self):
        """Crash the server by SIGKILL: what happened since its last dump is lost."""
        if self.pid:
            self._server.kill()
            self._server.wait()
        poll_until(self._sweep, lambda: "cannot kill %s" % self._family())

    def wait(self):
        """Return when the server has gone by itself (@shutdown), and its helpers too."""
        poll_until(lambda: not self.pid, lambda: "TinyMUX still runs\n" + self.log_tail())
        self.kill()

    def close(self):
        """End all processes; the folder stays."""
        atexit.unregister(self.close)
        self.kill()

    def command(self, line, user="Wizard", password="potrzebie"):
        """Run a command (several: CRLF between) on a fresh connection; return what it prints.

        It prints less when the server closes first (@shutdown), and nothing of what the server
        queues (@dolist). ConnectionError: not logged in. TimeoutError: no answer. All other
        connections of `user` see it too.
        """
        first, last = secrets.token_hex(8), secrets.token_hex(8)
        begin = "connect %s %s\r\nthink %s\r\n%s\r\n" % (user, password, first, line)
        end = ("think %s\r\nQUIT\r\n" % last).encode()
        text = b""
        with socket.create_connection((self.host, self.port), self.DEADLINE) as link:
            try:
                link.sendall(begin.encode() + end)
                for data in iter(lambda: link.recv(65536), b""):
                    text += data
            except socket.timeout:
                raise TimeoutError("no answer to %s: %r" % (line, text)) from None
            except ConnectionError:
                pass                            # it closed with some of our lines unread
        lines = text.decode(errors="replace").replace("\r\n", "\n")
        before, logged_in, after = lines.partition(first + "\n")
        if not logged_in:
            raise ConnectionError("%s cannot log in: %s" % (user, before))
        return after.partition(last + "\n")[0].rstrip("\n")

    def log_tail(self, lines=20):
        """Return the end of what the server wrote, for error messages."""
        logs = sorted(self.game.glob("*.log"), key=os.path.getmtime)[-2:]
        ends = (log.read_text(errors="replace").splitlines()[-lines:] for log in logs)
        return "\n".join(itertools.chain.from_iterable(ends))

    @staticmethod
    def _port_is_free(port):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            return False
        return True

    def _rotate_database(self):
        """Do as the package's Startmux: the last dump, if there is one, becomes the database."""
        data = self.game / "data"
        if (data / "netmux.db.new").exists():
            (data / "netmux.db").replace(data / "netmux.db.old")
            (data / "netmux.db.new").replace(data / "netmux.db")
        for path in (self.game / "restart.db", data / "netmux.db.CRASH"):
            if path.exists():
                path.unlink()

    def _answers(self):
        if not self.pid:
            raise RuntimeError("TinyMUX ended at once\n" + self.log_tail())
        try:
            with socket.create_connection((self.host, self.port), self.DEADLINE) as link:
                return link.recv(1)             # its banner: more than a place in the backlog
        except OSError:
            return False

    def _sweep(self):
        """Kill what is left of this game (helpers outlive a crash); True if nothing was."""
        left = self._family()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return not left

    def _family(self):
        """Return the pids of this game's processes; zombies, having no cwd, are not in it."""
        found, homes = [], (str(self.game), "%s (deleted)" % self.game)
        for proc in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(str(proc / "cwd")) in homes:
                    if (proc / "comm").read_text().strip() in self.FAMILY:
                        found.append(int(proc.name))
            except OSError:                     # gone meanwhile, or another user's
                continue
        return found


class RealWorld:
    """A real TinyMUX with the manners of a scripted world."""

    def __init__(self, case, players=(), conf=None):
        folder = new_folder(case, prefix="has-mux-")
        self.mux = closed_after(case, RealMux(folder, players=dict(players), conf=conf))
        self.address, self.kill, self.stop = self.mux.address, self.mux.kill, self.mux.close
        self.crash_losing, self.command = self.mux.kill, self.mux.command

    def start(self):
        self.mux.start()
        self.started = time.time()

    @property
    def running(self):
        return self.mux.pid is not None

    def online(self, name):
        return [found for found in self.command(
            "think [iter(lwho(),name(##),,|)]").strip().split("|") if found == name]

    def wait(self, predicate, seconds=5.0, what=""):
        until = time.monotonic() + seconds
        while not predicate(self):
            if time.monotonic() > until:
                raise AssertionError(f"not within {seconds} s: {what}")

    def dump(self):
        self.command("@dump")
        self.wait(lambda w: os.path.exists(self.mux.game / "data" / "netmux.db.new"),
                  what="the dump")

    def shutdown(self):
        self.command("@shutdown")
        self.mux.wait()

    def boot(self, name):
        """@boot, once the start id tells this life from another: the second in which it began is
        over.
        """
        self.wait(lambda w: time.time() > self.started + 1.2, what="a second has passed")
        self.command(f"@boot *{name}")

    def disable_logins(self, yes=True):
        self.command("@disable logins" if yes else "@enable logins")


# ---- --bench: has.py beside a direct connection and HAProxy
#
# The world and all clients are one process with one plain loop, so that it costs as little as
# Python can; every figure stands beside the same figure without a relay and through HAProxy, taken
# in turns in the same run.


BENCH_LINE = b"say " + b"x" * 74 + b"\r\n"
BENCH_RATE, BENCH_BULK_SESSIONS, BENCH_BULK_BYTES = 1000, 20, 16 << 20
BENCH_BLOCK = memoryview((b"b" * 78 + b"\r\n") * 820)
BENCH_PESTS = ("deaf", 200), ("slow", 200), ("mute", 200), ("flood", 50)
BENCH_FIGURES = (("lines_a_second", "lines a second, every session sending"),
                 ("cpu_us", "CPU per line, µs (there and back)"),
                 ("latency_us", f"latency at {BENCH_RATE} lines/s, median, µs"),
                 ("p99_us", "the same, 99th percentile, µs"),
                 ("bulk_mb", "bulk to the clients, MB/s"),
                 ("kb_a_session", "memory per idle session, kB"))


def process_usage(pid):
    """(CPU seconds, resident kB) of a process: from /proc, or from ps where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return ((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
                int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1024)
    except OSError:
        rss, cpu = subprocess.run(["ps", "-o", "rss=", "-o", "time=", "-p", str(pid)], check=True,
                                  stdout=subprocess.PIPE, universal_newlines=True).stdout.split()
        seconds = 0.0
        for part in re.split("[-:]", cpu):
            seconds = seconds * 60 + float(part)
        return seconds, float(rss)


class BenchLoad:
    """The world and the clients. The selector's data is the function that serves the socket."""

    def __init__(self, front, back, sessions, seconds, pid, beats):
        self.front, self.sessions, self.seconds = front, sessions, seconds
        self.pid, self.beats = pid, beats
        self.selector = selectors.DefaultSelector()
        self.partial, self.links, self.clients = {}, {}, []
        self.logged_in, self.heartbeat, self.lines, self.left = 0, False, 0, 0
        self.sent_at, self.owed, self.latencies, self.space = {}, {}, [], bytearray(262144)
        self.watch(socket.create_server(("127.0.0.1", back), backlog=4096), self.on_accept)

    def watch(self, sock, serve):
        os.set_blocking(sock.fileno(), False)
        self.selector.register(sock, selectors.EVENT_READ, serve)

    def serve_all(self, socks, serve, events=selectors.EVENT_READ):
        for sock in socks:
            self.selector.modify(sock, events, serve)

    def turn(self, longest=0.02):
        for key, _ in self.selector.select(longest):
            key.data(key.fileobj)

    def turn_until(self, done, seconds, what):
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() > until:
                raise RuntimeError(
                    f"{what}: not within {seconds} s "
                    f"({self.logged_in} of {self.sessions} logged in)")
            self.turn()

    # the world

    def on_accept(self, listener):
        sock = listener.accept()[0]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.watch(sock, self.on_newcomer)
        sock.send(b"Welcome to the benchmark\r\n")

    def on_newcomer(self, sock):
        """Login lines, and all that the heartbeat asks."""
        data = self.received(sock)
        if not data:
            self.selector.unregister(sock)
            sock.close()
            return
        *lines, self.partial[sock] = (self.partial.get(sock, b"") +
                                      data.replace(b"\xff\xfd\x56", b"")).split(b"\n")
        for line in lines:
            self.on_line(sock, line.strip())
        if b"\xff\xfd\x56" in data:                     # DO 86, the end of a login
            sock.send(b"\xff\xfc\x56")

    def on_line(self, sock, line):
        user = re.match(rb"connect u(\d+) ", line)
        if line.startswith(b"think "):                  # every password is right
            sock.send(re.sub(rb"\[?(?:password|checkpass)\((?:\\.|[^\\)])*\)\]?", b"1", line[6:]) +
                      b"\r\n")
        elif line.startswith(b"connect "):
            sock.send(b"Last connect was from here\r\n")
            if user:
                self.links[int(user.group(1))] = sock
                self.serve_all([sock], self.on_echo)
            elif line.startswith(b"connect flood"):
                self.serve_all([sock], self.on_flood)
            else:
                self.heartbeat = True

        elif line == b"more":                   # a pest that does not read it
            with contextlib.suppress(BlockingIOError):
                sock.send(BENCH_BLOCK[:2000])

    def on_flood(self, sock):
        self.on_echo(sock, lambda data: None)

    @staticmethod
    def received(sock):
        try:
            return sock.recv(65536)
        except ConnectionResetError:            # a pest was killed
            return b""

    def on_echo(self, sock, answer=None):
        data = self.received(sock)
        if data:
            (answer or sock.send)(data)
        else:
            self.selector.unregister(sock)
            sock.close()

    def on_writable(self, sock):
        try:
            self.owed[sock] -= sock.send(BENCH_BLOCK)
        except BlockingIOError:
            return
        if self.owed[sock] <= 0:
            self.serve_all([sock], self.on_echo)

    # the clients

    def log_in(self):
        for number in range(self.sessions):
            sock = socket.create_connection(("127.0.0.1", self.front), 10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.watch(sock, self.on_login)
            self.clients.append(sock)
            sock.send(b"connect u%d pw%d\r\n" % (number, number))
            self.turn(0)
        self.turn_until(lambda: self.logged_in == self.sessions, 60, "log in")

    def on_login(self, sock):
        self.partial[sock] = self.partial.get(sock, b"") + sock.recv(65536)
        if b"Last connect" in self.partial[sock] and self.partial[sock].endswith(b"\n"):
            self.logged_in += 1
            self.serve_all([sock], self.on_paced)

    def on_answer(self, sock):
        if sock.recv(65536)[-1:] == b"\n":              # one line is under way, so this is its end
            self.lines += 1
            sock.send(BENCH_LINE)

    def on_paced(self, sock):
        if sock.recv(65536)[-1:] == b"\n" and sock in self.sent_at:
            self.latencies.append(time.perf_counter() - self.sent_at.pop(sock))

    def on_bulk(self, sock):
        self.left -= sock.recv_into(self.space)

    # the workloads

    def run(self):
        """All workloads on the same sessions; returns {figure: value}."""
        if self.beats:
            self.turn_until(lambda: self.heartbeat, 20, "the heartbeat")
            self.idle(1.5)
        before = self.usage()[1]
        self.log_in()
        self.idle(0.5)
        figures = {"kb_a_session": (self.usage()[1] - before) / self.sessions} if self.pid else {}
        figures.update(self.paced(), **self.echo())
        self.idle(0.3)
        figures.update(self.bulk())
        return figures

    def run_tails(self):
        """Latencies of ordinary users, alone and beside each kind of pest; {kind: figures}."""
        if self.beats:
            self.turn_until(lambda: self.heartbeat, 20, "the heartbeat")
        self.log_in()
        self.idle(1)
        found = {"nobody": self.paced()}
        for kind, count in BENCH_PESTS:
            with subprocess.Popen([sys.executable, os.path.abspath(__file__), "--bench-pests",
                                   json.dumps([kind, count, self.front])],
                                  stdout=subprocess.PIPE) as pests:
                try:
                    ready = []
                    self.watch(pests.stdout, lambda pipe: ready.append(pipe.read(1)))
                    self.turn_until(lambda: ready, 30, kind)
                    self.selector.unregister(pests.stdout)
                    self.idle(1)
                    found[f"{count} {kind}"] = self.paced()
                finally:
                    pests.kill()
            self.idle(1)
        return found

    def usage(self):
        return process_usage(self.pid) if self.pid else (0, 0)

    def idle(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.turn()

    def paced(self):
        """An open loop: lines at a fixed rate, whatever comes back."""
        start = next_at = time.perf_counter()
        for number in itertools.cycle(range(self.sessions)):
            now = time.perf_counter()
            if now > start + self.seconds:
                break
            while now < next_at:
                self.turn(next_at - now)
                now = time.perf_counter()
            sock, next_at = self.clients[number], next_at + 1 / BENCH_RATE
            if sock not in self.sent_at:
                self.sent_at[sock] = now
                sock.send(BENCH_LINE)
        self.idle(0.2)
        times, self.latencies = sorted(self.latencies), []
        return {"latency_us": times[len(times) // 2] * 1e6,
                "p99_us": times[int(len(times) * 0.99)] * 1e6}

    def echo(self):
        """A closed loop: every session sends its next line when the last has come back."""
        self.serve_all(self.clients, self.on_answer)
        for sock in self.clients:
            sock.send(BENCH_LINE)
        self.idle(0.3)
        cpu, lines, start = self.usage()[0], self.lines, time.perf_counter()
        self.idle(self.seconds)
        lines, wall = self.lines - lines, time.perf_counter() - start
        figures = {"lines_a_second": lines / wall}
        if self.pid:
            figures["cpu_us"] = (self.usage()[0] - cpu) / lines * 1e6
        self.serve_all(self.clients, self.on_paced)
        return figures

    def bulk(self):
        """The world pours text into some sessions."""
        numbers = range(min(BENCH_BULK_SESSIONS, self.sessions))
        self.serve_all([self.clients[n] for n in numbers], self.on_bulk)
        self.owed = {self.links[n]: BENCH_BULK_BYTES for n in numbers}
        self.left, start = BENCH_BULK_BYTES * len(numbers), time.perf_counter()
        self.serve_all(self.owed, self.on_writable, selectors.EVENT_WRITE)
        self.turn_until(lambda: self.left <= 0, 120, "bulk")
        return {"bulk_mb": BENCH_BULK_BYTES * len(numbers) / (time.perf_counter() - start) / 1e6}


def pin(pid, which):
    """Relay and load on a processor each, where that can be had."""
    if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(pid, {sorted(os.sched_getaffinity(0))[which]})


def cleaner(stack):
    """What Has and its like want of a test case, for a contextlib.ExitStack."""
    return types.SimpleNamespace(addCleanup=stack.callback)


def start_haproxy(stack, front, back):
    folder = tempfile.mkdtemp(prefix="has-bench-")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    with open(os.path.join(folder, "haproxy.cfg"), "w") as file:
        file.write("global\n maxconn 9000\n nbthread 1\n"
                   "defaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n"
                   " timeout server 1h\n"
                   f"frontend f\n bind 127.0.0.1:{front}\n default_backend b\n"
                   f"backend b\n server m 127.0.0.1:{back}\n")
    relay = subprocess.Popen(["haproxy", "-f", file.name, "-db"], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    stack.callback(relay.wait)
    stack.callback(relay.kill)
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", front), 1):
            return relay.pid
        time.sleep(0.05)
    raise RuntimeError("haproxy did not start")


def bench_once(peer, sessions, seconds, work="run"):
    """One relay and one load; returns its figures."""
    with contextlib.ExitStack() as stack:
        back = front = free_port()
        pid = 0
        if peer == "has.py":
            has = Has(cleaner(stack), mush_address=f"127.0.0.1:{back}", mush_type="teenymush",
                      resume_rate=0, beat=2, log_level="info", keeper="auto")
            front, pid = has.port, has.worker
        elif peer == "haproxy":
            front = free_port()
            pid = start_haproxy(stack, front, back)
        if pid:
            pin(pid, 1)
        options = json.dumps([front, back, sessions, seconds, pid, peer == "has.py", work])
        load = subprocess.run([sys.executable, os.path.abspath(__file__), "--bench-load", options],
                              stdout=subprocess.PIPE)
        if load.returncode:
            raise SystemExit(f"bench: the load through {peer} failed")
        return json.loads(load.stdout.decode())


def bench_pests(options):
    """A crowd of one kind, in a process of its own, until it is killed."""
    kind, count, front = json.loads(options)
    pin(0, 0)
    socks = [socket.create_connection(("127.0.0.1", front), 10) for _ in range(count)]
    for number, sock in enumerate(socks if kind != "mute" else ()):
        sock.sendall(b"connect %s%d pw\r\n" % (kind.encode(), number))
        sock.setblocking(False)
    print("!", flush=True)
    said = {"mute": b"", "flood": BENCH_LINE * 20}.get(kind, b"more\r\n")
    while True:
        time.sleep(0.1)
        for sock in socks if said else ():
            with contextlib.suppress(BlockingIOError):
                sock.send(said)
            with contextlib.suppress(BlockingIOError):
                if kind == "slow":
                    sock.recv(100)


def bench_tails(rounds=3):
    """Print how long ordinary users wait for an answer beside pests."""
    peers = ["has.py"] + ["haproxy"] * bool(shutil.which("haproxy"))
    runs = {peer: [bench_once(peer, 100, 2.0, "run_tails") for _ in range(rounds)]
            for peer in peers}
    print(f"An answer to one of 100 users at {BENCH_RATE} lines/s beside others, µs; medians of "
          f"{rounds} rounds.\n")
    print("| beside | " + " | ".join(f"{peer} median | {peer} p99" for peer in peers) + " |")
    print("|---" + "|--:" * (2 * len(peers)) + "|")
    for beside in runs["has.py"][0]:
        figures = [statistics.median(run[beside][key] for run in runs[peer])
                   for peer in peers for key in ("latency_us", "p99_us")]
        print(f"| {beside} | " + " | ".join(f"{it:.0f}" for it in figures) + " |")
    print()


def machine():
    """The CPU's name, cores, system and Python, for the reader of the table."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError), open("/proc/cpuinfo") as file:
        name = re.search(r"model name\s*: (.*)", file.read()).group(1)
    return (f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
            f"Python {platform.python_version()}")


def shown(values):
    """The median, as it stands in the table."""
    middle = statistics.median(values) if values else 0
    return "-" if not values else f"{middle:.0f}" if middle >= 100 else f"{middle:.2f}"


def bench_table(results, sessions):
    """Markdown: medians over the rounds; ratios are taken round by round."""
    others = [peer for peer in results if peer != "has.py"]
    rows = [[f"{sessions} sessions", *results, *(f"has.py : {peer}" for peer in others)],
            ["---"] + ["--:"] * (len(results) + len(others))]
    for key, title in BENCH_FIGURES:
        figures = [[run[key] for run in runs if key in run] for runs in results.values()]
        ratios = [[ours[key] / theirs[key] for ours, theirs in zip(results["has.py"], results[peer])
                   if theirs.get(key)]
                  for peer in others]
        rows.append([title] + [shown(values) for values in figures + ratios])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def bench(what, sessions, seconds):
    """Print the tables that are wanted."""
    more_descriptors()
    print(f"`python3 test_has.py --bench` on {machine()}; has.py with its keeper, where there is "
          "one\n")
    if "relay" in what:
        bench_relay(sessions, seconds)
    if "tails" in what:
        bench_tails()
    if "return" in what:
        bench_return()
    return 0


def more_descriptors():
    """As many as this process may have."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE,
                           (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


def bench_relay(sessions, seconds, rounds=3):
    """Print the table of costs."""
    peers = ["direct", "has.py"] + ["haproxy"] * bool(shutil.which("haproxy"))
    results = {peer: [] for peer in peers}
    for number in range(rounds):
        for peer in peers:
            print(f"bench: round {number + 1} of {rounds}, {peer}", file=sys.stderr)
            results[peer].append(bench_once(peer, sessions, seconds))
    print(f"The relay; medians of {rounds} rounds; CPU and memory are the relay's.\n")
    print(bench_table(results, sessions) + "\n")


def bench_load(options):
    """The hidden half of --bench, in a process of its own."""
    pin(0, 0)
    more_descriptors()
    *more, work = json.loads(options)
    print(json.dumps(getattr(BenchLoad(*more), work)()))
    return 0


# ---- --bench: how fast a crowd is back, beside the server's own pace
#
# In every round the server dies (kill -9), a crowd logs in to its next life by itself, it dies
# again, and HAS brings the same crowd back to the next. Seconds count from its listen().

RETURN_COLUMNS = "first", "half", "95 %", "last", "server alone, last", "CPU of HAS"
LISTENS = "0A"                      # in /proc/net/tcp


class Rooms(TinyMUX):
    """Every user in a room of his own: nobody is told of anybody."""

    def announce(self, name, text):
        pass

    def look_text(self, name):
        return self.ROOM[0]


class RealReturn(RealMux):
    """The real TinyMUX with what ReturnBench uses of a scripted world."""

    ROOM = ("Limbo",)
    paced = True

    def stop(self):
        self.close()

    def start(self):
        """Return as soon as it listens."""
        self.launch()
        wanted = "%08X:%04X" % (socket.htonl(0x7f000001), self.port)
        poll_until(lambda: any(line.split()[1:4:2] == [wanted, LISTENS] for line in
                               pathlib.Path("/proc/net/tcp").read_text().splitlines()),
                   self.log_tail, 0.001)


class Crowd:
    """Users in one plain loop: `texts` is what each has heard."""

    def __init__(self, stack, count):
        self.names = [f"u{number}" for number in range(count)]
        self.socks, self.texts = [], []
        self.selector = selectors.DefaultSelector()
        stack.callback(self.leave)

    def leave(self):
        self.selector.close()
        for sock in self.socks:
            sock.close()

    def log_in(self, port, most, wanted, seconds=60):
        """Log all in, with at most so many links that nobody has accepted yet; return when each has
        heard that text. A first byte speaks for the links before it."""
        arriving, times = collections.deque(), {}
        until = time.monotonic() + seconds
        while len(times) < len(self.names):
            if time.monotonic() > until:
                raise RuntimeError(f"{len(times)} of {len(self.names)} logged in")
            while len(arriving) < most and len(self.socks) < len(self.names):
                number = len(self.socks)
                self.socks.append(has.begin_connect((socket.AF_INET, ("127.0.0.1", port))))
                self.texts.append(b"")
                self.selector.register(self.socks[-1], selectors.EVENT_WRITE, number)
                arriving.append(number)
            ready = self.selector.select(0.3)
            if not ready:                       # PennMUSH has forgotten one: another wakes it
                socket.create_connection(("127.0.0.1", port)).close()
            for key, events in ready:
                number = key.data
                if events & selectors.EVENT_WRITE:
                    self.selector.modify(key.fileobj, selectors.EVENT_READ, number)
                    name = self.names[number].encode()
                    key.fileobj.sendall(b"connect %s pw%s\r\n" % (name, name))
                    continue
                self.read(number)
                while arriving and arriving[0] <= number:
                    arriving.popleft()
                if wanted in self.texts[number]:
                    times.setdefault(number, time.monotonic())
        return sorted(times.values())

    def read(self, number):
        data = self.socks[number].recv(65536)
        self.texts[number] += data
        has.acknowledge(self.socks[number])
        if not data:
            raise RuntimeError(f"{self.names[number]} was thrown out: {self.texts[number][-200:]}")

    def hear(self, wanted, seconds):
        """Return when each has heard the text that is wanted of him, sorted."""
        times, until = {}, time.monotonic() + seconds
        while len(times) < len(self.names):
            left = until - time.monotonic()
            if left < 0:
                raise RuntimeError(f"{len(times)} of {len(self.names)} heard {wanted[0]!r}")
            for key, _ in self.selector.select(left):
                self.read(key.data)
                if wanted[key.data] in self.texts[key.data]:
                    times.setdefault(key.data, time.monotonic())
        return sorted(times.values())

    def forget(self):
        """Hear from now on; return what was heard."""
        heard, self.texts = self.texts, [b""] * len(self.texts)
        return heard


class ReturnBench:
    """A server and its crowd: `most` links that it has not accepted yet are safe."""

    def __init__(self, stack, world, count, most, keeper="auto"):
        self.stack, self.world, self.count, self.most = stack, world, count, most
        self.keeper = keeper
        stack.callback(world.stop)
        self.room = world.ROOM[0].splitlines()[0].encode()

    def alone(self):
        """Seconds until the last of a crowd is in by itself."""
        self.world.kill()
        with contextlib.ExitStack() as stack:
            crowd = Crowd(stack, self.count)
            self.world.start()
            began = time.monotonic()
            last = crowd.log_in(self.world.port, self.most, self.room)[-1] - began
        return last

    def enter(self):
        """A HAS in front of the server, and the crowd in it."""
        self.world.kill()
        self.world.start()
        self.world.paced, paced = False, self.world.paced
        self.has = Has(cleaner(self.stack), mush_address=self.world.address, beat=10, retry=1,
                       log_level="info", mush_type="auto", keeper=self.keeper).wait_up()
        self.worker = self.has.worker
        self.crowd = Crowd(self.stack, self.count)
        self.crowd.log_in(self.has.port, 8, self.room)
        self.answer()
        self.world.paced = paced

    def answer(self):
        """All are in the game."""
        marks = [b"=%d=" % number for number in range(self.count)]
        for sock, mark in zip(self.crowd.socks, marks):
            sock.sendall(b"think %s\r\n" % mark)
        self.crowd.hear(marks, 30)

    def back(self, pause):
        """Kill the server, start it `pause` seconds later; return the figures of the return."""
        crowd = self.crowd
        crowd.forget()
        self.world.kill()
        crowd.hear([OFFLINE.encode()] * self.count, 20)
        time.sleep(pause)
        before = self.has.cpu_seconds(self.worker)
        self.world.start()
        began = time.monotonic()
        times = [at - began for at in crowd.hear([ONLINE.encode()] * self.count, 60)]
        cpu = self.has.cpu_seconds(self.worker) - before
        shown = [text for text in crowd.forget() if self.room in text]
        if shown:
            raise RuntimeError(f"{len(shown)} were shown their login: {shown[0]}")
        self.answer()
        return [times[int((len(times) - 1) * part)] for part in (0, 0.5, 0.95, 1)] + [cpu]


def real_return(players):
    folder = tempfile.mkdtemp(prefix="has-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return RealReturn(folder, players=players)


def paced(kind, **quirks):
    """Makes a world of that kind with the real one's pace."""
    return lambda players: kind(players=players, paced=True, quota=False, **quirks)


# (title, makes the world, users, links that it has not accepted yet and takes well)
RETURNS = (
    ("TinyMUX, the real one", real_return, 100, 64),
    ("TinyMUX", paced(TinyMUX), 100, 64),
    ("TeenyMUSH", paced(TeenyMUSH), 100, 1),
    ("RhostMUSH", paced(RhostMUSH), 100, 4),
    ("PennMUSH, 5 look-ups lost, not in a row",
     paced(PennMUSH, accept_bug=True, lost_look_ups=range(56, 91, 7)), 100, 2),
    ("PennMUSH, 5 look-ups lost in a row",
     paced(PennMUSH, accept_bug=True, lost_look_ups=range(56, 61)), 100, 6),
    ("TinyMUSH", paced(TinyMUSH), 100, 4),
    ("TinyMUX, a room each", paced(Rooms), 1000, 64))


def bench_return_of(make, count, most, rounds):
    """The rows of figures of that many rounds."""
    players = {"heartbeat": "heartbeat", **{f"u{number}": f"pwu{number}"
                                            for number in range(count)}}
    with contextlib.ExitStack() as stack:
        it = ReturnBench(stack, make(players), count, most)
        alone = [it.alone() for _ in range(rounds)]
        it.enter()
        rows = [it.back(0.5 + 0.2 * number) for number in range(rounds)]
    return [row[:4] + [last] + row[4:] for row, last in zip(rows, alone)]


def bench_return(rounds=3):
    """Print how fast crowds are back."""
    print(f"Back after kill -9, seconds from the server's listening; medians of {rounds} rounds;")
    print("but for the first the servers are scripted, with the pace of the real ones.\n")
    print("| | users | " + " | ".join(RETURN_COLUMNS) + " |")
    print("|---" + "|--:" * (len(RETURN_COLUMNS) + 1) + "|")
    for title, make, count, most in RETURNS:
        if make is real_return and RealMux.available():
            continue
        rows = bench_return_of(make, count, most, rounds)
        figures = [f"{statistics.median(column):.2f}" for column in zip(*rows)]
        print("| " + " | ".join([title, str(count)] + figures) + " |", flush=True)


# ---- --demo: see the main job done, without a MUSH

class DemoWorld(TinyMUX):
    """A small, friendly TinyMUX."""
    BANNER = ("\r\n  ~ The Lighthouse ~   a world of one room, which does not live long\r\n\r\n"
              "    connect Alice alicepw         come in as Alice (or Bob bobpw, Carol carolpw)\r\n"
              "    create YourName yourpassword  come in as yourself\r\n"
              "    QUIT                          leave\r\n\r\n")
    NEWUSER = "The keeper writes your name into the big book.\r\n"
    ROOM = ("The lamp room\r\nThe great lamp turns above you, and the sea is all around.\r\n"
            "Try: say hello, look, think [add(2,3)], WHO\r\n",) * 2

    def login_text(self, conn, name):
        return ""

    def look_text(self, name):
        others = sorted(set(self.people()) - {name})
        return self.ROOM[0] + (f"Here with you: {', '.join(others)}\r\n" if others else "")

    def people(self):
        return [conn.player for conn in self.online() if conn.player != "heartbeat"]


class Demo:
    """The world, HAS before it, and the crashes."""
    AWAY_SECONDS = 5

    def __init__(self, stack, every):
        self.every = every
        self.world = DemoWorld().start()
        stack.callback(self.world.stop)
        self.has = Has(cleaner(stack), mush_address=self.world.address, mush_type="tinymux",
                       local_port=self.port(), beat=2, retry=0.2).wait_up()
        self.watches_keys = sys.stdin is not None

    @staticmethod
    def port():
        """4201, or any free port when that is taken."""
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 4201)):
            return 4201
        return free_port()

    @staticmethod
    def say(text):
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def key_or(self, seconds):
        """Wait for Enter at most so long; True if it came."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            keys = [sys.stdin] if self.watches_keys else []
            if not select.select(keys, [], [], until - time.monotonic())[0]:
                continue
            if os.read(sys.stdin.fileno(), 4096):
                return True
            self.watches_keys = False                   # closed: no terminal
        return False

    def crash(self):
        people = self.world.people()
        self.world.kill()
        self.say(
            f"the world has crashed (as by kill -9); HAS holds {', '.join(people) or 'nobody yet'}")
        self.key_or(self.AWAY_SECONDS)
        self.world.start()
        began = time.monotonic()
        self.say("the world is started again")
        with contextlib.suppress(AssertionError):       # somebody may have left meanwhile
            self.world.wait(lambda world: not set(people) - set(world.people()), 3)
        if self.world.people():
            took = (time.monotonic() - began) * 1000
            self.say(f"{', '.join(self.world.people())}: back in the game {took:.0f} ms later, "
                     "without typing anything")

    def run(self):
        print(f"""
A small world that crashes, and HAS in front of it. In another window type:

    telnet 127.0.0.1 {self.has.port}
    connect Alice alicepw

Press Enter here: the world crashes at once, and returns {self.AWAY_SECONDS} s later
(Enter again: now).
It also crashes by itself every {self.every:g} s. Ctrl-C ends the demo.
""", flush=True)
        while True:
            self.key_or(self.every)
            self.crash()


def demo(every):
    """Run until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        try:
            Demo(stack, every).run()
        except KeyboardInterrupt:
            print("\nThe demo ends.", flush=True)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    return 0


# ---- --soak: random users, random trouble, and what must hold all along

SOAK_NAMES = "Alder Birch Cedar Dogwood Elm Fir Ginkgo Hazel Juniper Larch".split()
SOAK_PASSWORDS = {"heartbeat": "heartbeat", "Wizard": "wizpw",
                  **{n: n.lower() + "pw" for n in SOAK_NAMES + ["Sponge"]}}
SOAK_DEADLINE = 30


class SoakUser:
    """One user: what he is to the world (playing or not), and the connection he has now, if any."""

    def __init__(self, name, deaf=False):
        self.name, self.deaf, self.client, self.playing = name, deaf, None, False

    def prove(self, world):
        """He plays, as himself: a line of his is heard by the world on his connection, and
        answered.
        """
        until = time.monotonic() + SOAK_DEADLINE
        for number in itertools.count(1):
            mark = f"mark {self.name} {number} {time.monotonic():.3f}"
            try:
                self.client.send(f"say {mark}\r\n").expect(re.escape(f'You say, "{mark}"'), 2)
                break
            except AssertionError as error:
                # a line typed while the world is away is not sent
                if time.monotonic() > until or not str(error).startswith("no "):
                    raise AssertionError(f"{self.name}: {str(error)[-1500:]}") from None
        heard = [line for conn in world.online(self.name) for line in list(conn.lines)]
        assert any(mark.encode() in line
                   for line in heard), f"{self.name} speaks, but not as himself"
        self.client.text = self.client.seen = b""


class SoakSite:
    """A HAS, two worlds and their users, driven by a thread of its own whose choices depend on the
    seed alone.
    """
    STEPS = {"crash": 8, "shutdown": 2, "freeze": 2, "long_freeze": 1, "restart": 1, "hup": 1,
             "move": 1, "upgrade": 2, "quit": 2, "boot": 2, "logout": 1, "reset": 1, "arrive": 5,
             "pest": 2, "password": 1, "die": 6}
    MEANWHILE = {"arrive": 4, "quit": 2, "reset": 1, "chat": 2, "upgrade": 1, "hup": 1, "die": 3}

    def __init__(self, families, seed, until, tls, kept):
        self.family, self.random, self.until, self.tls = families[0], random.Random(
            f"{seed} {families[0]}"), until, tls
        self.kept = kept                        # by a keeper: now and then HAS is killed
        self.counts, self.events = collections.Counter(), collections.deque(maxlen=15)
        self.users = [SoakUser(name) for name in SOAK_NAMES] + [SoakUser("Sponge", deaf=True)]
        self.pests, self.leaving, self.upgrading, self.failure = [], [], None, ""
        self.deaths = 0
        self.families, self.settled = families, {}
        self.thread = threading.Thread(target=self.run, name=self.family, daemon=True)

    def run(self):
        try:
            with contextlib.ExitStack() as stack:
                self.drive(stack)
        except Exception:
            # at its end HAS or a world had something to say
            self.failure = self.failure or self.evidence(traceback.format_exc())

    def drive(self, stack):
        try:
            self.set_up(stack)
            while time.monotonic() < self.until:
                self.step(self.pick(self.STEPS))
                self.settle()
            self.last_checks()
        except Exception:
            self.failure = self.evidence(traceback.format_exc())

    def set_up(self, stack):
        quirks = {"silent_start": 0.05} if "pennmush" in self.families else {}
        self.worlds = [WORLDS[family](SOAK_PASSWORDS, **quirks) for family in self.families]
        for world in self.worlds:
            stack.callback(world.stop)
            world.start()
        folder = tempfile.mkdtemp(prefix="has-soak-")
        stack.callback(shutil.rmtree, folder)
        settings = {}
        if self.tls:
            cert, key = certificate(folder)
            settings = {"local_port": free_port(), "local_port_ssl": free_port(), "ssl_cert": cert,
                        "ssl_key": key}
        self.has = Has(cleaner(stack), script=shutil.copy(HAS, folder),
                       mush_address=self.world.address, beat=2, hb_timeout=1, dead_after=4,
                       retry=0.2, keeper="auto" if self.kept else "no", **settings).wait_up()
        self.tls_port = settings.get("local_port_ssl")
        for _ in range(5):
            self.do_arrive()
        self.settle()

    @property
    def world(self):
        return self.worlds[0]

    @property
    def pid(self):
        """Of the process that serves: a keeper's child, once the last one's death is over."""
        keeper = self.has.process.pid
        if self.kept:
            children = f"/proc/{keeper}/task/{keeper}/children"
            poll_until(lambda: read_text(children), lambda: "HAS was not started anew")
        return int(read_text(children).split()[0]) if self.kept else keeper

    def pick(self, weights):
        return self.random.choices(list(weights), list(weights.values()))[0]

    def user(self, playing=True):
        """One that plays (or does not), or None."""
        found = [user for user in self.users if user.playing == playing and not user.deaf]
        return self.random.choice(found) if found else None

    def step(self, name):
        self.events.append(f"{time.strftime('%H:%M:%S')} {name}")
        getattr(self, "do_" + name)()

    def meanwhile(self):
        """What users and admins do while the world is away or returning."""
        for _ in range(self.random.randrange(4)):
            self.step(self.pick(self.MEANWHILE))
            time.sleep(self.random.choice((0, 0, 0.05, 0.3)))

    # what happens; settle() looks at what came of it

    def do_arrive(self):
        """Somebody logs in: over TLS or not, at once or letter by letter, also when the world is
        down.
        """
        user, tls, slow = self.user(
            playing=False), self.random.random() < 0.4, self.random.random() < 0.2
        if user:
            if not user.client:
                self.connect(user, tls and self.tls)
            line = f"connect {user.name} {self.world.players[user.name]}\r\n"
            for piece in re.findall("(?s).{1,3}", line) if slow else [line]:
                user.client.send(piece)
                time.sleep(0.01 if slow else 0)
            user.playing = True
            self.counts["logins"] += 1

    def connect(self, user, tls):
        if tls:
            self.finish_upgrade()                       # a handshake does not live through one
        user.client = TLSClient(self.tls_port) if tls else self.has.client()
        self.counts["tls clients" if tls else "clients"] += 1

    def let_go(self, user):
        client, user.client, user.playing = user.client, None, False
        return client

    def do_quit(self):
        user = self.user()
        if user:
            user.client.send("QUIT\r\n")
            self.leaving.append((f"{user.name} has QUIT", self.let_go(user)))
            self.counts["quits"] += 1

    def do_boot(self):
        user = self.user()
        if user:
            self.world.boot(user.name)
            self.leaving.append((f"{user.name} was booted", self.let_go(user)))
            self.counts["boots"] += 1

    def do_reset(self):
        user = self.user()
        if user:
            self.let_go(user).reset()
            self.counts["resets"] += 1

    def do_logout(self):
        """Back to the login screen, where he stays until he logs in again."""
        user = self.user()
        if user and self.world.family != "teenymush":
            user.client.send("LOGOUT\r\n")
            user.playing = False
            self.world.wait(lambda world: not world.online(user.name),
                            what=f"{user.name} has logged out")
            self.counts["logouts"] += 1

    def do_chat(self):
        for user in self.users:
            if user.client and not user.deaf and self.random.random() < 0.5:
                user.client.send(f"say {'bla ' * self.random.randrange(1, 30)}\r\n")

    def do_crash(self):
        if self.random.random() < 0.3:
            self.do_arrive()                            # a login under way when it dies
        for again in range(self.random.choice((1, 1, 1, 2))):
            if again:                                   # once more, while they return
                time.sleep(self.random.uniform(0, 0.7))
            else:
                self.before_a_death()
            self.world.reset_on_kill = self.random.random() < 0.3
            self.world.kill()
            self.counts["crashes"] += 1
            self.comes_back()

    def comes_back(self):
        self.meanwhile()
        time.sleep(self.random.choice((0, self.random.uniform(0, 3))))
        self.world.start()
        self.meanwhile()

    def before_a_death(self):
        """A while passes: HAS rightly bars whom the world follows into death again and again."""
        self.deaths += 1
        time.sleep(has.Suspects.WINDOW + 0.5 if self.deaths % 2 else self.random.uniform(0, 2))

    def do_shutdown(self):
        self.before_a_death()
        self.world.shutdown(delay=0.3)
        self.world.wait(lambda world: not world.running)
        self.counts["shutdowns"] += 1
        self.comes_back()

    def do_freeze(self):
        """Too short to be a death: nobody may notice more than the pause."""
        self.finish_upgrade()
        self.world.wait(lambda w: any(sum(b"think" in line for line in c.lines) > 2
                                      for c in w.online("heartbeat")), 20,
                        # or the freeze would only prolong a crash
                        "the heartbeat is in and beats")
        after = len(self.has.log)
        self.world.freeze()
        self.do_chat()
        time.sleep(self.random.uniform(0.1, 2.5))
        self.world.thaw()
        self.counts["freezes"] += 1
        self.settle(trim=False)
        assert b"the world is down" not in self.has.log[
            after:], "a short freeze was taken for a death"

    def do_long_freeze(self):
        poll_until(lambda: "is up for" in self.has.ask("--status").stdout,
                   lambda: "the world is not up", 0.1)  # nobody may have waited for it
        after = len(self.has.log)
        self.world.freeze()
        self.has.wait_log(rb"the world is down", 20, after)
        self.meanwhile()
        self.world.thaw()
        self.counts["long freezes"] += 1

    def do_die(self):
        """kill -9 of the process that serves, at whatever it does."""
        if self.kept:
            # who is accepted in these very 20 us has come for nothing
            just = 0.05 if "arrive" in "".join(list(self.events)[-2:]) else 0
            time.sleep(just + self.random.choice((0, self.random.uniform(0, 0.02))))
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.counts["kills"] += 1

    def do_restart(self):
        if self.world.RESTART:
            self.world.restart_in_place()
            self.counts["in-place restarts"] += 1

    def do_hup(self):
        self.has.signal(signal.SIGHUP)
        self.counts["HUPs"] += 1

    def do_move(self):
        after = len(self.has.log)
        self.worlds.reverse()
        self.has.configure(mush_address=self.world.address)
        self.has.signal(signal.SIGHUP)
        self.has.wait_log(rb"the world moves from", SOAK_DEADLINE, after)
        self.counts["moves"] += 1
        self.meanwhile()

    def do_upgrade(self):
        """Begin one; it goes on beside what follows."""
        self.finish_upgrade()
        self.upgrading = len(self.has.log)
        self.has.signal(signal.SIGUSR2)
        self.counts["upgrades"] += 1

    def finish_upgrade(self):
        if self.upgrading is not None:
            self.has.wait_log(rb"goes on where", SOAK_DEADLINE, self.upgrading)
            self.upgrading = None

    def do_password(self):
        """A new password; half the time the world then dies and forgets it."""
        user, loses = self.user(), self.random.random() < 0.5
        if not user:
            return
        for world in self.worlds:
            world.dump()
        new = f"{user.name.lower()}{self.random.randrange(10 ** 6)}"
        user.client.send(f"@password {self.world.players[user.name]}={new}\r\n")
        user.client.expect("(?i)password changed|changed your password")
        self.worlds[1].players[user.name] = new
        self.counts["new passwords"] += 1
        if loses:
            self.world.crash_losing()
            self.counts["crashes"] += 1
            self.comes_back()
            self.worlds[1].players[user.name] = self.world.players[user.name]

    def do_pest(self):
        """A client that is no user: silent, full of garbage, without TLS on the TLS port, or one
        that never reads.
        """
        kind, length = self.random.randrange(4), self.random.choice((10, 999, 30000))
        junk = bytes(self.random.getrandbits(8) for _ in range(length))
        if kind == 3:
            return self.sponge()
        while len(self.pests) >= 3:
            self.pests.pop(0).close()
        self.pests.append(Client(self.tls_port if kind == 2 and self.tls else self.has.port))
        with contextlib.suppress(OSError):
            self.pests[-1].send(junk if kind else b"")
        self.counts["pests"] += 1

    def sponge(self):
        """He logs in, gets a flood he never reads, or is gone."""
        user, choice = self.users[-1], self.random.randrange(3)
        if not user.client:
            self.connect(user, False)
            user.client.send("connect Sponge spongepw\r\n")
            user.playing = True
        elif choice:
            self.world.emit(user.name, (b"w" * 78 + b"\r\n") * 20000)
        else:
            self.let_go(user).reset()

    # what must hold

    def settle(self, trim=True):
        """The world is up: wait until everybody is where he belongs, once, and prove it."""
        self.finish_upgrade()
        self.find_everybody(SOAK_DEADLINE)
        for what, client in self.leaving:
            try:
                client.expect_end(15)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from None
            client.close()
        self.leaving.clear()
        for user in self.users:
            if user.playing and not user.deaf:
                user.prove(self.world)
            elif user.client and not user.deaf:
                user.client.sock.setblocking(False)
                with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
                    assert user.client.sock.recv(
                        1 << 20), f"{user.name} at the login screen was dropped"
        self.find_everybody(0)                          # still nobody twice
        self.check_process()
        if trim:
            self.trim()

    def find_everybody(self, seconds):
        """Who plays is in the world once, the others are not, and nobody is in the other world."""
        until = time.monotonic() + seconds
        while True:
            lost = [user for user in self.users
                    if len(self.world.online(user.name)) != user.playing or
                    self.worlds[1].online(user.name)]
            if not lost:
                return
            assert time.monotonic() < until, "not where they belong: " + "; ".join(
                map(self.story, lost))
            time.sleep(0.02)

    def story(self, user):
        """What became of one user."""
        if user.client:
            with contextlib.suppress(OSError):
                user.client.sock.settimeout(0.5)
                user.client.text += user.client.sock.recv(1 << 20)
        counts = [len(world.online(user.name)) for world in self.worlds]
        should = f"{user.name} should be in {[int(user.playing), 0]} times"
        return f"{should}, is {counts}; last saw " + repr(
            user.client and user.client.text[-2500:])

    def check_process(self):
        assert self.has.process.poll() is None, "HAS has ended"
        killed = rb"HAS was killed by SIGKILL|the new has.py has failed within a minute"
        bad = re.search(rb".*( ERROR (?!%s)|Traceback|a fault of HAS).*" % killed, self.has.log)
        assert not bad, f"the log says: {bad.group().decode()}"
        assert not any(world.errors for world in self.worlds), [
            world.errors for world in self.worlds]
        until = time.monotonic() + 15                   # clients that leave may take 10 s
        while self.extra_descriptors() > self.settled.setdefault(
                "descriptors", self.extra_descriptors()) + 3:
            assert time.monotonic() < until, f"descriptors grow: {self.descriptors()}"
            time.sleep(0.2)

    def descriptors(self):
        with contextlib.suppress(OSError):
            return [os.readlink(f"/proc/{self.pid}/fd/{fd}")
                    for fd in os.listdir(f"/proc/{self.pid}/fd")]
        return []

    def extra_descriptors(self):
        """Those that do not belong to a client or its link."""
        clients = [user.client for user in self.users if user.client] + self.pests
        in_tls = sum(isinstance(client, TLSClient) for client in clients)   # ... on two sockets
        return len(self.descriptors()) - 2 * len(clients) - in_tls

    def trim(self):
        """Forget what only this driver remembers, or a soak of days would eat the machine."""
        self.counts["returns"] += self.has.log.count(b"is back in the game")
        self.counts["login screens"] += self.has.log.count(b"WAITING -> LOGIN")
        with self.has._change:
            self.recent, self.has._log = getattr(self, "recent", b"")[-100000:] + self.has._log, b""
        for world in self.worlds:
            for table in (world.lines, world.all_connections, world.logins, world.evaluated,
                          world.forged):
                table.clear()
            for conn in world.connections:
                conn.raw.clear(), conn.lines.clear()
        self.counts["steps"] += 1
        if self.counts["steps"] == 25:
            self.settled["kB"] = process_usage(self.pid)[1]

    def last_checks(self):
        """Memory and idle CPU; then everybody leaves, and HAS ends when it is told."""
        grown = process_usage(self.pid)[1] - self.settled.get("kB", 0)
        assert "kB" not in self.settled or grown < 16000, f"memory has grown by {grown:.0f} kB"
        before = process_usage(self.pid)[0]
        time.sleep(4)
        idle = (process_usage(self.pid)[0] - before) / 4
        assert idle < 0.05, f"idle, it uses {idle:.0%} of a processor"
        for client in [user.client for user in self.users if user.client] + self.pests:
            client.close()
        self.world.wait(lambda world: len(world.online()) == 1, SOAK_DEADLINE,
                        "all have left, the heartbeat stays")
        until = time.monotonic() + 5
        # all but the process that speaks TLS
        while len(self.children().split()) > bool(self.tls):
            assert time.monotonic() < until, f"clients have left, children not: {self.children()}"
            time.sleep(0.1)
        status = self.has.stop()
        assert status == 0, f"HAS ended with status {status}"
        self.counts["kB grown"] = int(grown if "kB" in self.settled else 0)
        self.counts["idle CPU %"] = round(idle * 100, 1)

    def children(self):
        with contextlib.suppress(OSError), open(
                f"/proc/{self.pid}/task/{self.pid}/children") as file:
            return file.read()
        return ""

    def evidence(self, trouble):
        log = getattr(self, "recent", b"") + self.has.log if hasattr(self, "has") else b""
        return "\n".join([f"=== {self.family}: {trouble}", "last events: " + ", ".join(self.events),
                          "--- the end of the log:",
                          *log.decode("utf-8", "replace").splitlines()[-150:], "--- the world:",
                          self.world.transcript(60)])


def soak(minutes, seed):
    """Run a site for each family; returns the exit status."""
    began, tls = time.monotonic(), bool(shutil.which("openssl"))
    names = [name for name in WORLDS if name != "plain"]
    sites = [SoakSite((name, names[number - 1]), seed, began + minutes * 60, tls,
                      number % 2 and not has.why_no_vault()) for number, name in enumerate(names)]
    print(f"soak: seed {seed}, {minutes:g} minutes, HAS before {', '.join(names)}"
          f"{'' if tls else ', without TLS'}", flush=True)
    for site in sites:
        site.thread.start()
    told = began
    while any(site.thread.is_alive() for site in sites):
        time.sleep(0.2)
        if any(site.failure for site in sites):
            for site in sites:
                site.until = 0
        if time.monotonic() - told >= 30:
            told = time.monotonic()
            print(f"soak: {told - began:4.0f} s: {soak_summary(sites)}", flush=True)
    for site in sites:
        print(site.failure or f"soak: {site.family} clean: {site.counts['kB grown']} kB grown, "
                              f"idle CPU {site.counts['idle CPU %']} %")
    failed = [site.family for site in sites if site.failure]
    print(f"soak: {'FAILED for ' + ', '.join(failed) if failed else 'clean'}, seed {seed}, "
          f"{(time.monotonic() - began) / 60:.1f} minutes: {soak_summary(sites)}")
    return 1 if failed else 0


def soak_summary(sites):
    counts = collections.Counter()
    for site in sites:
        counts.update({key: value for key, value in dict(site.counts).items() if key not in (
            "kB grown", "idle CPU %")})
    return ", ".join(f"{value} {key}" for key, value in sorted(counts.items()))


# ---- The command line of these three

def tool_parser():
    """The options of --bench, --demo and --soak."""
    parser = argparse.ArgumentParser(prog="test_has.py", allow_abbrev=False, add_help=False,
                                     usage="test_has.py [TEST ...] | --bench | --demo | "
                                           "--soak MINUTES")
    parser.add_argument("--bench", nargs="*", metavar="WHAT", choices=("relay", "tails", "return"),
                        help="measure has.py beside a direct connection and HAProxy (relay), "
                             "answers beside pests (tails), and how fast a crowd is back beside "
                             "the server's own pace (return)")
    parser.add_argument("--sessions", type=int, default=400, help="with --bench (400)")
    parser.add_argument("--seconds", type=float, default=2.0,
                        help="with --bench: for each workload (2)")
    parser.add_argument("--demo", action="store_true",
                        help="a small world that crashes, and HAS in front of it")
    parser.add_argument("--every", type=float, default=60.0,
                        help="with --demo: seconds between crashes (60)")
    parser.add_argument("--soak", type=float, metavar="MINUTES",
                        help="random users and random trouble")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100000,
                        help="with --soak: to repeat one")
    parser.add_argument("--bench-load", help=argparse.SUPPRESS)
    parser.add_argument("--bench-pests", help=argparse.SUPPRESS)
    return parser


def tool(arguments):
    """--bench, --demo, --soak: do it and return the exit status.

    None if none of them is asked for.
    """
    options, _ = tool_parser().parse_known_args(arguments)
    if options.bench_load:
        return bench_load(options.bench_load)
    if options.bench_pests:
        return bench_pests(options.bench_pests)
    if options.bench is not None:
        what = options.bench or ("relay", "tails", "return")
        return bench(what, options.sessions, options.seconds)
    if options.demo:
        return demo(options.every)
    return None if options.soak is None else soak(options.soak, options.seed)


# ---- Running
#
# Classes that start programs side by side, a few tests to a process; the rest in one more.

class Result(unittest.TextTestResult):
    """Counts single tests: passed is what ended in nothing else."""

    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def run_here(names):
    """Run tests in this process; return (passed, failed, skipped)."""
    Nursery.open()
    faulthandler.dump_traceback_later(LONGEST_RUN, exit=True)   # one lost event must not hang it
    loader = unittest.defaultTestLoader
    module = sys.modules[__name__]
    suite = loader.loadTestsFromNames(names,
                                      module) if names else loader.loadTestsFromModule(module)
    logging.getLogger("has").addHandler(logging.NullHandler())
    result = unittest.TextTestRunner(resultclass=Result, verbosity=1).run(suite)
    failed = {test.id().split(" ")[0] for test, _ in result.failures + result.errors}
    for line in skip_lines(result.skipped):
        print(line)
    return result.passed, len(failed) + len(result.unexpectedSuccesses), len(result.skipped)


def skip_lines(skipped):
    """What was skipped and why, a line for each reason."""
    tests = {}
    for test, reason in skipped:
        tests.setdefault(reason, []).append(test.id().partition(".")[2])
    return [f"SKIP {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
            for reason, names in tests.items()]


class Job:
    """Tests in a process of their own, forked: it need not compile all this again."""

    def __init__(self, names):
        self.names = names
        self.output = tempfile.TemporaryFile()
        sys.stdout.flush()
        self.pid = os.fork() or self.child()

    def child(self):
        """Run the tests in the new process, and end it."""
        status = 2
        try:
            with open(os.devnull) as null:
                os.dup2(null.fileno(), 0)
            os.dup2(self.output.fileno(), 1)
            os.dup2(1, 2)
            print("%d passed, %d failed, %d skipped" % run_here(self.names))
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def report(self):
        """The process has ended: print what is worth it, return (passed, failed, skipped)."""
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        counts = re.search(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", text, re.M)
        counts = tuple(map(int, counts.groups())) if counts else (0, 1, 0)
        for line in [text] if counts[1] else re.findall(r"(?m)^SKIP .*", text):
            print(line)
        return counts


def pieces():
    """Lists of tests for a process each: what starts programs by a few tests, the longest first.

    The rest.
    """
    loader = unittest.defaultTestLoader
    classes = [it for it in vars(sys.modules[__name__]).values() if isinstance(it, type)
               and issubclass(it, unittest.TestCase) and loader.getTestCaseNames(it)]
    apart = [[f"{it.__name__}.{name}" for name in loader.getTestCaseNames(it)] for it in classes
             if issubclass(it, APART)]
    result = [[it.__name__ for it in classes if not issubclass(it, APART)]]
    for tests in sorted(apart, key=lambda tests: (not tests[0].startswith(SLOW), -len(tests))):
        result += [tests[start::-(-len(tests) // PIECE)]
                   for start in range(-(-len(tests) // PIECE))]
    return result


def run_all():
    """Run every test, those that start programs side by side.

    Print the counts of each class, return all of them.
    """
    waiting, jobs, total = pieces(), {}, collections.defaultdict(lambda: [0, 0, 0])
    while waiting or jobs:
        while waiting and len(jobs) < SIDE_BY_SIDE:
            job = Job(waiting.pop(0))
            jobs[job.pid] = job
        job = jobs.pop(os.wait()[0])
        name = job.names[0].partition(".")[0] if "." in job.names[0] else "those without programs"
        total[name] = [a + b for a, b in zip(total[name], job.report())]
    for name, counts in total.items():
        print(f"{name:<30} {counts[0]:>4} passed {counts[1]:>3} failed {counts[2]:>3} skipped")
    return [sum(column) for column in zip(*total.values())]


APART = (Case, Scenarios, TelnetCase)            # these start programs
SLOW = "TestCrashes", "TestTeenyStable"          # few tests, that wait long
SIDE_BY_SIDE, PIECE = 6, 6          # processes (they mostly wait), tests for one of them
LONGEST_RUN = 600                   # seconds for a class; then it fails and shows where it hangs


def main():
    """Run what the command line asks for; return the exit status."""
    status = tool(sys.argv[1:])
    if status is not None:
        return status
    parser = argparse.ArgumentParser(description=(
        "Test HAS. Without arguments: everything. Other modes: --demo (a small world that crashes, "
        "and HAS in front of it), --bench, --soak MINUTES [--seed N]."))
    parser.add_argument("--here", action="store_true", help="in this process, one after another")
    parser.add_argument("names", nargs="*", help="classes, or CLASS.TEST")
    options = parser.parse_args()
    counts = run_here(options.names) if options.here or options.names else run_all()
    print("%d passed, %d failed, %d skipped" % tuple(counts))
    return 1 if counts[1] else 0


if __name__ == "__main__":
    sys.exit(main())
