"""Asks a guest's agent what libvirt has no call for."""

import json
from typing import Any

import libvirt_qemu

ANSWER_S = 5
"""How long an agent may take to answer; libvirt would wait for ever."""


def ask(domain: Any, command: str, **arguments: object) -> Any:
    """Return the agent's answer. What it refuses, and its silence, is an error of libvirt's."""
    text = json.dumps({"execute": command, "arguments": arguments})
    return json.loads(libvirt_qemu.qemuAgentCommand(domain, text, ANSWER_S, 0))["return"]
