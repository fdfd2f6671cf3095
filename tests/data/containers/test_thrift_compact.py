from __future__ import annotations

import pytest

from imgcls.data.containers import thrift_compact as thrift


def test_a_struct_is_read_as_it_was_encoded() -> None:
    numbers = [0, 1, -1, 63, 64, -65, 2**31 - 1, -(2**31)]
    data = thrift.encode_struct(
        {
            1: thrift.i32(-5),
            4: thrift.i64(2**40),
            5: thrift.binary(b"x" * 300),
            7: thrift.sequence([thrift.i32(each) for each in numbers * 3]),
            9: thrift.struct({2: thrift.sequence([thrift.struct({1: thrift.i32(7)})])}),
        }
    )
    fields = {1: -5, 4: 2**40, 5: b"x" * 300, 7: numbers * 3, 9: {2: [{1: 7}]}}
    assert thrift.read_struct(data) == (fields, len(data))
    assert thrift.read_struct(b"before" + data + b"after", 6) == (fields, 6 + len(data))
    for end in range(len(data)):
        with pytest.raises(thrift.ThriftTruncated):
            thrift.read_struct(data[:end])


def test_a_struct_of_the_specification_is_read() -> None:
    # field 1: true; field 2: false; field 20, with its id written out: 3 as i16
    assert thrift.read_struct(bytes([0x11, 0x12, 0x04, 40, 6, 0]))[0] == {1: True, 2: False, 20: 3}


@pytest.mark.parametrize(
    "data",
    [b"\x1f\x00", b"\x15" + b"\xff" * 12, b"\x1c" * 40, b"\x1b\x01"],
    ids=["unknown type", "long integer", "nested", "map"],
)
def test_other_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(thrift.ThriftError):
        thrift.read_struct(data)
