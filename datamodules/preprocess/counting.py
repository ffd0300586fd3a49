"""Count: order the values of one categorical column over all segments into a vocabulary, and write the ids of each
segment's distinct values.

Distinct values are counted and looked up, not rows: 138,000 skewed rows of a column have 7,000 distinct values on
average. A worker holds the distinct values between two bounds; the others are on disk. All vocabularies together are
never in memory.

The alternative is to look a column's values up in the vocabulary of another dataset.
"""

import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datamodules.folder import Folder
from datamodules.preprocess.encoding import Encoding, distinct_values, items_of, scratch_folder, write_ids
from datamodules.preprocess.journal import record, recorded, written_aside
from datamodules.preprocess.staging import OpenSegment, Segment, load_segments, rows_of
from datamodules.preprocess.table_encoding import PLACEHOLDER_IDS, Table, by_frequency, trained_ids
from datamodules.preprocess.transforms import quantile_edges, range_scale, standard_scale
from datamodules.preprocess.value_ranges import ValueRanges
from datamodules.values import staged_name
from lightning_dlrm.contracts.schema import DatasetSchema

_VALUES_AT_ONCE = 1 << 22  # of a column's distinct values in all segments: 200 MB while they are sorted
_IDS_AT_ONCE = 1 << 20  # a row group of a vocabulary
_SAMPLED_VALUES = 1 << 16
_COPIED_AT_ONCE = 1 << 20

_TEXTS_AT_ONCE = 1 << 20  # the same for texts, which take more memory

_ID = np.dtype(np.int32)
_COUNT = np.dtype(np.int64)


def count_column(encoding: Encoding, table: Table) -> dict[str, Any]:
    """Count a categorical column; write its vocabulary and the ids of every segment's distinct values.

    The values are spread over files by ranges, so that each range can be sorted in memory; the ids
    within a range follow from the numbers of values of each count in the ranges before it.

    Returns:
        ``cardinality`` (rows of the table), ``distinct`` (values counted), ``kept`` (counted values with an id of their
        own), ``reserved`` (ids of missing, rare and unknown values, as far as ``unknown`` and ``missing`` of the schema
        reserve them).
    """
    if done := recorded(encoding.record_of(table)):
        return done
    reserved = dict(table.reserved)
    with scratch_folder(encoding, table.name) as scratch:
        spread, missing_rows = _spread_values(encoding, table, scratch)
        totals = [_group(spread, part) for part in range(spread.parts)]
        first_id = max(reserved.values(), default=-1) + 1
        kept, rare_values, rare_rows = _assign(spread, totals, table, first_id)
        rows = max(first_id + kept, 1)
        modulus = encoding.recipe.schema.id_modulo
        if modulus is not None and modulus >= rows:
            modulus = None  # changes nothing, and might not fit an id's type
        _write_vocabulary(encoding, table, spread, first_id, kept, missing_rows, rare_rows, modulus)
        write_ids(encoding, table, _ids_of_segments(encoding, table, spread, modulus))
    if encoding.recipe.schema.unknown == "rare":
        reserved = trained_ids(reserved, missing_rows, rare_rows, rows)
    facts = {
        "cardinality": modulus or rows,
        "distinct": kept + rare_values,
        "kept": kept,
        "reserved": reserved,
    }
    return record(encoding.record_of(table), facts, encoding.files_of(table))


def fit_column(encoding: Encoding, name: str) -> dict[str, Any]:
    """Fit the transform of a column of numbers to the counted rows.

    Returns:
        ``edges`` of quantile bins, or ``scales``: see ``Fitted``.
    """
    path, column = encoding.folder / "ids" / f"{name}.fit", encoding.recipe.schema.columns[name]

    def pieces() -> Iterator[np.ndarray]:
        for segment in load_segments(encoding.segments):
            with OpenSegment(segment) as opened:
                rows = rows_of(encoding.rule, opened, encoding.recipe.counted)
                numbers, missing = opened.numbers(staged_name("number", column.source or name), rows)
                yield numbers[~missing] if column.fill is None else np.where(missing, column.fill, numbers)

    if done := recorded(path):
        return done
    if column.transform == "quantile":
        return record(path, {"edges": quantile_edges(pieces, column.quantiles)})
    return record(path, {"scales": (standard_scale if column.transform == "standard" else range_scale)(pieces())})


def _values_of(table: Table, segment: Segment) -> pa.Array:
    with OpenSegment(segment) as opened:
        values = distinct_values(table, opened)[0]
        # A copy, which outlives the mapped file.
        return pa.concat_arrays([values, values[:0]])


def _spread_values(encoding: Encoding, table: Table, scratch: Path) -> tuple[ValueRanges, int]:
    """Read all segments once; also return how many counted rows are missing."""
    segments = load_segments(encoding.segments)
    spread = ValueRanges(scratch, _bounds(table, segments))
    missing_rows = 0
    for some in _segments_at_once(table, segments):
        found, of_values = [], []
        for segment in some:
            with OpenSegment(segment) as opened:
                values, codes, ends = distinct_values(table, opened)
                items, _ = items_of(rows_of(encoding.rule, opened, encoding.recipe.counted), ends)
                counts = np.bincount(codes[items], minlength=len(values) + 1)
                missing_rows += int(counts[len(values) :].sum())
                found.append(pa.concat_arrays([values, values[:0]]))
                of_values.append(counts[: len(values)])
        spread.lengths += map(len, found)
        entries, of_entries = pa.concat_arrays(found), np.concatenate(of_values)
        order, range_ends = spread.order(entries)
        if not isinstance(order, slice):
            entries, of_entries = entries.take(pa.array(order)), of_entries[order]
        for part, (start, end) in enumerate(pairwise([0, *range_ends])):
            spread.add_values(part, "entries", entries[start:end])
            spread.add(part, "counts", of_entries[start:end])
    return spread, missing_rows


def _segments_at_once(table: Table, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Yield consecutive segments with a bounded number of distinct values of a column together."""
    ends = np.cumsum([segment.distinct.get(table.source, 0) for segment in segments])
    for _, some in groupby(zip(ends // _values_at_once(table), segments, strict=True), key=itemgetter(0)):
        yield [segment for _, segment in some]


def _values_at_once(table: Table) -> int:
    return min(_VALUES_AT_ONCE, _TEXTS_AT_ONCE) if table.is_text else _VALUES_AT_ONCE


def _bounds(table: Table, segments: Sequence[Segment]) -> pa.Array:
    """Return the bounds between ranges of about ``_values_at_once`` entries each, from a sample of the values."""
    parts = -(-sum(segment.distinct.get(table.source, 0) for segment in segments) // _values_at_once(table))
    if parts <= 1:
        return pa.array([], pa.uint32())
    looked_at = segments[:: max(len(segments) // 64, 1)]
    samples = []
    for segment in looked_at:
        values = _values_of(table, segment)
        if len(values):
            step = max(len(values) * len(looked_at) // _SAMPLED_VALUES, 1)
            samples.append(values.take(pa.array(np.arange(0, len(values), step))))
    sample = pa.concat_arrays(samples)
    places = pc.array_sort_indices(sample).take(pa.array(np.arange(1, parts) * len(sample) // parts))
    return sample.take(places).unique()


def _group(spread: ValueRanges, part: int) -> np.ndarray:
    """Group the equal values of a range.

    Replaces ``entries`` and ``counts`` by ``groups`` (the different values, integers in ascending order) and
    ``inverse`` (int32: for each entry the position of its value in ``groups``).

    Returns:
        int64: the counts of the groups.
    """
    entries, of_entries = spread.take_values(part, "entries"), spread.take(part, "counts", _COUNT)
    if pa.types.is_string(entries.type):
        encoded = entries.dictionary_encode()
        groups, inverse = encoded.dictionary, encoded.indices.to_numpy()
        # In float64, whose sums of counts are exact below 2**53.
        counts = np.bincount(inverse, of_entries, len(groups)).astype(np.int64)
    else:
        groups, counts, inverse = _group_integers(entries.to_numpy(), of_entries)
    spread.add_values(part, "groups", groups)
    spread.add(part, "inverse", inverse)
    return counts


def _group_integers(entries: np.ndarray, of_entries: np.ndarray) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Return the different values of uint32 [n] in ascending order, their counts, and of each entry its value's
    position."""
    # One sort of 64-bit integers, which numpy does with vector instructions, brings values and positions.
    packed = entries.astype(np.uint64) << np.uint64(32) | np.arange(len(entries), dtype=np.uint64)
    packed.sort()
    order = (packed & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    values = (packed >> np.uint64(32)).astype(np.uint32)
    del packed
    first = np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])
    starts = np.flatnonzero(first)
    counts = np.add.reduceat(of_entries[order], starts, dtype=np.int64) if len(starts) else np.empty(0, np.int64)
    inverse = np.empty(len(entries), np.int32)
    inverse[order] = np.cumsum(first, dtype=np.int32) - 1
    return pa.array(values[starts]), counts, inverse


def _assign(spread: ValueRanges, totals: list[np.ndarray], table: Table, first_id: int) -> tuple[int, int, int]:
    """Assign every value its id: by descending count over all ranges, ties by value.

    Replaces ``groups`` and ``inverse`` by ``ids`` (int32, of each entry), ``run`` (the values in the order of their
    ids) with ``run_counts``, ``run_ids`` and ``edges`` (int64, where in ``run`` each row group of the vocabulary
    begins), and, if the vocabulary lists them, ``rare`` with ``rare_counts``.

    Returns:
        Values with an id of their own, other values counted, and rows with these.
    """
    min_count = table.min_count
    counts = [np.unique(total[total >= min_count], return_counts=True) for total in totals]
    all_counts = np.unique(np.concatenate([values for values, _ in counts]))
    numbers = np.zeros(len(all_counts), np.int64)
    for values, how_many in counts:
        numbers[np.searchsorted(all_counts, values)] += how_many
    kept = int(numbers.sum())
    assert first_id + kept < 1 << 31, "ids are int32"
    most = kept if table.most_rows is None else min(kept, table.most_rows - first_id)
    next_id = first_id + kept - np.cumsum(numbers)  # of the next value of each count; the largest count comes first
    edges = np.arange(first_id, first_id + most + _IDS_AT_ONCE, _IDS_AT_ONCE)
    rare_values = rare_rows = 0
    for part, total in enumerate(totals):
        groups = spread.take_values(part, "groups")
        chosen = np.flatnonzero(total >= min_count)
        if table.is_text:
            chosen = chosen[pc.array_sort_indices(groups.take(pa.array(chosen))).to_numpy()]
        chosen = chosen[by_frequency(total[chosen])]
        position = np.searchsorted(all_counts, total[chosen])
        starts = np.flatnonzero(np.append(True, position[1:] != position[:-1])) if len(position) else position
        lengths = np.diff(np.append(starts, len(position)))
        rank = np.arange(len(position)) - np.repeat(starts, lengths)
        ids = next_id[position] + rank
        next_id[position[starts]] += lengths
        is_kept = ids < first_id + most
        chosen, ids = chosen[is_kept], ids[is_kept]
        is_rare = total > 0
        is_rare[chosen] = False
        rare = np.flatnonzero(is_rare)
        of_group = np.full(len(total), PLACEHOLDER_IDS["unknown"], np.int32)
        of_group[rare] = PLACEHOLDER_IDS["rare"]
        of_group[chosen] = ids
        rare_values, rare_rows = rare_values + len(rare), rare_rows + int(total[rare].sum())
        spread.add(part, "ids", of_group[spread.take(part, "inverse", _ID)])
        spread.add_values(part, "run", groups.take(pa.array(chosen)))
        spread.add(part, "run_counts", total[chosen])
        spread.add(part, "run_ids", ids.astype(_ID))
        spread.add(part, "edges", np.searchsorted(ids, edges))
        if table.lists_rare:
            spread.add_values(part, "rare", groups.take(pa.array(rare)))
            spread.add(part, "rare_counts", total[rare])
    return most, rare_values, rare_rows


def _write_vocabulary(
    encoding: Encoding,
    table: Table,
    spread: ValueRanges,
    first_id: int,
    kept: int,
    missing_rows: int,
    rare_rows: int,
    modulus: int | None,
) -> None:
    """Write the values in the order of ids: row i has id i (modulo ``id_modulo`` of the schema).

    Reserved ids come first and have no value. Rare values follow at the end if the schema says ``list_rare``.
    """
    path, reserved = encoding.vocabulary(table), table.reserved
    value = "value" if table.is_text else "hash"
    schema = pa.schema(
        [(value, pa.string() if table.is_text else pa.uint32()), ("count", pa.int64()), ("id", pa.int32())]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_aside(path) as partial,
        pq.ParquetWriter(
            partial,
            schema,
            compression="zstd",
            use_dictionary=["count"],
            column_encoding={value: "PLAIN", "id": "DELTA_BINARY_PACKED"},
            store_schema=False,
        ) as writer,
    ):

        def write(values: pa.Array, counts: np.ndarray, ids: np.ndarray) -> None:
            if len(ids):
                ids = (ids % modulus if modulus else ids).astype(np.int32)
                columns = [values, pa.array(counts, pa.int64()), pa.array(ids)]
                writer.write_table(pa.table(columns, schema=schema))

        of_reserved = np.zeros(first_id, np.int64)
        if "missing" in reserved:
            of_reserved[reserved["missing"]] += missing_rows
        if "rare" in reserved and not table.lists_rare:
            of_reserved[reserved["rare"]] += rare_rows
        write(pa.nulls(first_id, schema.types[0]), of_reserved, np.arange(first_id))
        edges = [spread.get(part, "edges", np.dtype(np.int64)) for part in range(spread.parts)]
        for number, start in enumerate(range(first_id, first_id + kept, _IDS_AT_ONCE)):
            values, counts, ids = [], [], []
            for part in range(spread.parts):
                begin, end = edges[part][number], edges[part][number + 1]
                values.append(spread.get_values(part, "run")[begin:end])
                counts.append(spread.get(part, "run_counts", _COUNT, begin, end))
                ids.append(spread.get(part, "run_ids", _ID, begin, end))
            order = np.argsort(np.concatenate(ids))
            in_order = pa.concat_arrays(values).take(pa.array(order))
            write(in_order, np.concatenate(counts)[order], np.arange(start, start + len(order)))
        for part in range(spread.parts) if table.lists_rare else ():
            counts_of_rare = spread.get(part, "rare_counts", _COUNT)
            ids_of_rare = np.full(len(counts_of_rare), reserved["rare"])
            write(spread.get_values(part, "rare"), counts_of_rare, ids_of_rare)


def _ids_of_segments(
    encoding: Encoding, table: Table, spread: ValueRanges, modulus: int | None
) -> Iterator[np.ndarray]:
    """Yield the ids of the entries of each segment, in order."""
    begins = np.zeros(spread.parts, np.int64)
    all_lengths = iter(spread.lengths)
    for some in _segments_at_once(table, load_segments(encoding.segments)):
        lengths = list(islice(all_lengths, len(some)))
        order, ends = spread.order(
            pa.concat_arrays([_values_of(table, segment) for segment in some])
            if spread.parts > 1
            else range(sum(lengths))
        )
        stops = begins + np.diff(ends, prepend=0)
        bounds = zip(begins.tolist(), stops.tolist(), strict=True)
        ids = np.empty(sum(lengths), _ID)
        ids[order] = np.concatenate([spread.get(part, "ids", _ID, *of_part) for part, of_part in enumerate(bounds)])
        begins = stops
        if modulus:
            ids = np.where(ids < 0, ids, ids % modulus)
        yield from np.split(ids, np.cumsum(lengths)[:-1])


def look_up_column(encoding: Encoding, vocabulary: str, known: DatasetSchema, table: Table) -> dict[str, Any]:
    """Write the ids of every segment's distinct values by the vocabulary of another dataset, and copy the vocabulary.

    Args:
        encoding: the encoding.
        vocabulary: the folder of the other dataset.
        known: its schema.
        table: the column.

    Returns:
        ``cardinality``.
    """
    if done := recorded(encoding.record_of(table)):
        return done
    folder, file = Folder(vocabulary), known.vocabulary[table.name].path
    look_up = _look_up_texts if table.is_text else _look_up_integers
    with_rare = (
        np.where(ids == table.reserved["rare"], np.int32(PLACEHOLDER_IDS["rare"]), ids) if table.lists_rare else ids
        for ids in look_up(folder, file, table, load_segments(encoding.segments))
    )
    write_ids(encoding, table, with_rare)
    encoding.vocabulary(table).parent.mkdir(parents=True, exist_ok=True)
    with (
        written_aside(encoding.vocabulary(table)) as partial,
        folder.open(file) as source,
        partial.open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy, _COPIED_AT_ONCE)
    return record(
        encoding.record_of(table),
        {"cardinality": known.features.tables[table.name]},
        encoding.files_of(table),
    )


def _look_up_integers(folder: Folder, path: str, table: Table, segments: Sequence[Segment]) -> Iterator[np.ndarray]:
    known = _known_values(folder, path)
    for segment in segments:
        yield _look_up(known, _values_of(table, segment).to_numpy(), PLACEHOLDER_IDS["unknown"])


def _look_up_texts(folder: Folder, path: str, table: Table, segments: Sequence[Segment]) -> Iterator[np.ndarray]:
    """Read the vocabulary once for some segments, a row group at a time; the values of these segments are in memory."""
    for some in _segments_at_once(table, segments):
        values = [_values_of(table, segment) for segment in some]
        encoded = pa.concat_arrays(values).dictionary_encode()
        ids = np.full(len(encoded.dictionary), PLACEHOLDER_IDS["unknown"], np.int32)
        with folder.open_vocabulary(path) as file:
            for group in range(file.num_row_groups):
                known = file.read_row_group(group, columns=["value", "id"], use_threads=False)
                known = known.filter(pc.is_valid(known.column("value"))).combine_chunks()
                places = pc.index_in(encoded.dictionary, value_set=known.column("value"))
                found = places.is_valid().to_numpy(zero_copy_only=False)
                ids[found] = known.column("id").to_numpy()[places.drop_null().to_numpy()]
        of_entries = ids[encoded.indices.to_numpy()]
        yield from np.split(of_entries, np.cumsum([len(of_segment) for of_segment in values])[:-1])


def _known_values(folder: Folder, path: str) -> np.ndarray:
    """Return the hashes of a vocabulary and their ids as ``hash << 32 | id``, uint64 [n] in ascending order.

    Terabyte's largest column takes 2.3 GB; neither reading nor sorting holds it twice.

    Raises:
        UserError: the file is missing or altered.
    """
    end = 0
    with folder.open_vocabulary(path) as file:
        known = np.empty(file.metadata.num_rows, np.uint64)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["hash", "id"], use_threads=False)
            table = table.filter(pc.is_valid(table.column("hash")))
            part = known[end : end + table.num_rows]
            part[:] = table.column("hash").to_numpy()
            part <<= np.uint64(32)
            part |= table.column("id").to_numpy().astype(np.uint64)
            end += len(part)
    known = known[:end]
    known.sort()
    return known


def _look_up(known: np.ndarray, values: np.ndarray, unknown: int) -> np.ndarray:
    """Return the ids int32 [d] of values uint32 [d].

    Args:
        known: as ``_known_values`` returns them.
        unknown: the id of unknown values.
    """
    ids = np.full(len(values), unknown, np.int32)
    if len(known):
        ascending = np.argsort(values)  # any other order would jump through a large vocabulary
        wanted = values[ascending].astype(np.uint64) << np.uint64(32)
        entry = known[np.minimum(np.searchsorted(known, wanted), len(known) - 1)]
        is_known = entry >> np.uint64(32) == wanted >> np.uint64(32)
        ids[ascending[is_known]] = (entry[is_known] & np.uint64(0xFFFFFFFF)).astype(np.int32)
    return ids
