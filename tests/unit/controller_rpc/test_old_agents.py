"""What agents of an older release say is understood, and what is said to them: by the descriptors that they were built with.

`agents-2026-11-23.binpb` holds the protos of that day's agents, as `buf build --exclude-source-info` made it of commit dcea7fc: the
oldest with a session. It is never made anew. Shown is that each message of then and now has the other's meaning for every field that
both know, and that a verb which an old agent has not is an error that names the cure. The old agent's own program is not run.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from trimtab_protos.agent.v1 import agent_service_pb2, beacon_service_pb2, beacon_service_pb2_grpc, domain_pb2
from trimtab_protos.controller.v1 import gateway_service_pb2
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.status import from_rpc_error

FROZEN = Path(__file__).with_name("agents-2026-11-23.binpb")
OLD_FILES = descriptor_pb2.FileDescriptorSet.FromString(FROZEN.read_bytes()).file
NOW = descriptor_pool.Default()
DEPTH = 4
# Loaded, so that today's pool knows them.
assert agent_service_pb2 and gateway_service_pb2 and domain_pb2  # noqa: PT018


def old_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for one in OLD_FILES:
        pool.Add(one)  # type: ignore[no-untyped-call]
    return pool


OLD = old_pool()
MESSAGES = sorted(
    f"{one.package}.{message.name}" for one in OLD_FILES if one.package.startswith("trimtab") for message in one.message_type
)
VERBS = sorted(
    f"{one.package}.{service.name}.{method.name}" for one in OLD_FILES for service in one.service for method in service.method
)


def made(pool: Any, name: str) -> Message:
    """The message with every field set to something that is not its default."""
    found: Message = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))()
    fill(found, DEPTH)
    return found


def fill(message: Message, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        is_many = field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED
        if field.message_type is not None:
            if field.message_type.GetOptions().map_entry:
                value = message_factory.GetMessageClass(field.message_type)()
                fill(value, 1)
                if field.message_type.fields_by_name["value"].message_type is None:
                    getattr(message, field.name)[value.key] = value.value
            elif depth:
                fill(getattr(message, field.name).add() if is_many else getattr(message, field.name), depth - 1)
            continue
        scalar = sample(field)
        if is_many:
            getattr(message, field.name).append(scalar)
        else:
            setattr(message, field.name, scalar)


def sample(field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return b"b7" if field.type == FieldDescriptor.TYPE_BYTES else f"s{field.number}"
        case FieldDescriptor.CPPTYPE_BOOL:
            return True
        case FieldDescriptor.CPPTYPE_ENUM:
            return field.enum_type.values[-1].number
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return 1.5
        case _:
            return field.number + 1


def same(one: Message, other: Message) -> list[str]:
    """Return the fields that both messages know and that do not say the same."""
    wrong = []
    for field in one.DESCRIPTOR.fields:
        their = other.DESCRIPTOR.fields_by_name.get(field.name)
        if their is None:
            continue
        mine, yours = getattr(one, field.name), getattr(other, field.name)
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            is_same = dict(mine) == dict(yours) if hasattr(mine, "items") else repr(mine) == repr(yours)
            wrong += [] if is_same else [f"{field.full_name}: {mine!r} became {yours!r}"]
        elif isinstance(mine, Message):
            wrong += same(mine, yours)
        else:
            wrong += [line for pair in zip(mine, yours, strict=True) for line in same(*pair)]
    return wrong


@pytest.mark.parametrize("name", MESSAGES)
def test_each_message_of_an_old_agent_is_read_as_it_was_meant_and_the_other_way_round(name: str) -> None:
    said = made(OLD, name)
    heard = message_factory.GetMessageClass(NOW.FindMessageTypeByName(name))()
    heard.ParseFromString(said.SerializeToString())
    assert same(said, heard) == []
    told = made(NOW, name)
    understood = message_factory.GetMessageClass(OLD.FindMessageTypeByName(name))()
    understood.ParseFromString(told.SerializeToString())
    assert [line for line in same(told, understood) if "became" in line] == []


@pytest.mark.parametrize("name", VERBS)
def test_each_verb_of_an_old_agent_is_still_there_with_its_messages(name: str) -> None:
    service, verb = name.rsplit(".", 1)
    old = OLD.FindServiceByName(service).methods_by_name[verb]
    now = NOW.FindServiceByName(service).methods_by_name[verb]
    assert (now.input_type.full_name, now.output_type.full_name) == (old.input_type.full_name, old.output_type.full_name)


def test_the_frozen_release_is_an_older_one() -> None:
    assert len(MESSAGES) > 50
    assert len(VERBS) > 15
    with pytest.raises(KeyError):
        OLD.FindServiceByName("trimtab_protos.agent.v1.BeaconService")


def test_a_verb_that_an_old_agent_has_not_is_refused_with_the_cure(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"unix:{tmp_path}/old.sock"
    server.add_insecure_port(address)
    server.start()
    try:
        with grpc.insecure_channel(address) as channel:
            stub = beacon_service_pb2_grpc.BeaconServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.RpcError) as failed:
                stub.ReadSlots(beacon_service_pb2.ReadSlotsRequest(), timeout=10)
    finally:
        server.stop(None)
    told = from_rpc_error(failed.value, peer="node1")  # type: ignore[arg-type]
    assert (type(told), told.code) == (InvalidRequest, "verb-unknown")
    assert "node1 is too old for this verb; upgrade its agent" in told.message
