"""The rows of files as a file of Arrow's, which `datasets` maps into memory.

Cells of tables stay text, as they are written: a type that is inferred would turn "NA" into nothing and "007" into 7.
JSON's values get the type that gives them back as they are; a column of several kinds is kept as JSON. Parquet keeps
its own types.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_freeze.errors import ReviewsError
from hf_freeze.files import whole
from hf_freeze.summarization.data.files import TABLES
from hf_freeze.summarization.data.rows import Row, RowFiles, word_kind

__all__ = ["write_arrow"]

BATCH = 1_000  # rows that are kept together
DEEPEST = 50  # lists within lists that Arrow hands on; at 64 it gives up


def write_arrow(files: RowFiles, place: Path) -> None:
    """Writes the rows of all files to a stream of Arrow's, whole or not at all.

    Raises:
        ReviewsError: A row is broken, or a column's values are of kinds that no data set holds.
        OSError: The disk is full or gone.
    """
    kinds: dict[str, dict[str, str]] = {}
    try:
        schema = _schema(files, kinds)
        with whole(place) as name, pa.OSFile(str(name), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for batch in _batches(files, schema):
                stream.write_batch(batch)
    except (pa.ArrowException, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, ReviewsError):
            raise
        for _ in files:  # which names the row, where the file is at fault
            pass
        mixed = (
            f"column {name!r} holds {' and '.join(f'{kind} ({places[kind]})' for kind in places if kind != 'null')}"
            for name, places in kinds.items()
            if len(places.keys() - {"null"}) > 1
        )
        raise ReviewsError(
            f"{files.path} could not be read as {files.kind}: {next(mixed, str(error).strip())}. All rows must have "
            f"the same columns, each once and of one type."
        ) from error


def _schema(files: RowFiles, kinds: dict[str, dict[str, str]]) -> pa.Schema:
    """The type of each column; of JSON's values their kinds too, each with its first place."""
    if files.kind in TABLES:
        return pa.schema([(name, pa.string()) for name in files.columns])
    if files.kind == "Parquet":
        schemas = [_without_categories(pq.read_schema(path)) for path in files.files]
        return pa.unify_schemas(schemas, promote_options="permissive")
    types: dict[str, pa.DataType] = {}
    for rows in _chunks(files):
        for row in rows:
            for name, value in row.values.items():
                kinds.setdefault(name, {}).setdefault(word_kind(value), row.place)
        for name in files.columns:
            values = [row.values.get(name) for row in rows]
            types[name] = _common(types.get(name, pa.null()), _type_of(values))
    return pa.schema(list(types.items()))


def _batches(files: RowFiles, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    if files.kind == "Parquet":
        for batch in files.parquet_batches():
            batch.validate(full=True)  # strings may be no UTF-8
            yield from pa.Table.from_batches([batch]).cast(schema).to_batches()
        return
    for rows in _chunks(files):
        yield pa.record_batch(
            [_array([row.values.get(field.name) for row in rows], field.type) for field in schema], schema=schema
        )


def _chunks(files: RowFiles) -> Iterator[list[Row]]:
    rows = iter(files)
    while chunk := list(itertools.islice(rows, BATCH)):
        yield chunk


def _without_categories(schema: pa.Schema) -> pa.Schema:
    for at, field in enumerate(schema):
        if pa.types.is_dictionary(field.type):
            schema = schema.set(at, field.with_type(field.type.value_type))
    return schema


def _type_of(values: list[Any]) -> pa.DataType:
    """The type that gives the values back as they are."""
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        return _json(str(error))
    nested = pa.types.is_nested(array.type)
    if nested and (str(array.type).count("<") > DEEPEST or array.to_pylist() != values):
        return _json("its objects differ")
    return array.type


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return _json(f"it is {one}, and further down {other}")


def _json(why: str) -> pa.DataType:
    """The type of what is kept as JSON, which `datasets` has from 4.7 on."""
    if not hasattr(datasets, "Json"):
        raise TypeError(why)
    return pa.json_()


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not isinstance(kind, pa.BaseExtensionType):
        return pa.array(values, kind)
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    for text in filter(None, texts):
        datasets.Json().decode_example(text)  # which takes no number of more than 64 bits
    return pa.ExtensionArray.from_storage(kind, pa.array(texts, pa.string()))
