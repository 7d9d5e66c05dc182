"""A `.beton` writer of its own, as FFCV's would do it: an independent referee, without side files."""

from pathlib import Path

import cv2
import numpy as np

KINDS = {"float": (0, np.dtype("<f8")), "int": (1, np.dtype("<i8"))}
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])


def write_beton(path: Path, pictures, fields, *, modes="jpg", page=2**23, seed=0) -> Path:
    """`fields`: {name: "image", "int" or "float", or (kind, values)}, in file order. `modes`: jpg, raw, or one each.

    Records lie in a random order, in pages padded to their full size; so does the table.
    """
    rows, draw = len(pictures), np.random.default_rng(seed)
    modes = [modes] * rows if isinstance(modes, str) else modes
    given = {n: (f, None) if isinstance(f, str) else f for n, f in fields.items()}
    types = [(2, IMAGE) if kind == "image" else KINDS[kind] for kind, _ in given.values()]
    dtype = np.dtype([("", dtype) for _, dtype in types], align=True)
    values = np.zeros(rows, dtype)
    for name, (kind, data) in zip(dtype.names, given.values(), strict=True):
        if kind != "image":
            values[name] = data
    image = values[dtype.names[[kind for kind, _ in types].index(2)]]
    at = -(-(24 + 1041 * len(types) + values.nbytes) // page) * page
    body, table = bytearray(), []
    for i in draw.permutation(rows):
        record = pictures[i].tobytes()
        if modes[i] == "jpg":
            bgr = cv2.cvtColor(pictures[i], cv2.COLOR_RGB2BGR)
            record = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        if len(body) // page != (len(body) + len(record) - 1) // page:
            body += bytes(-len(body) % page)
        image[i] = (modes[i] == "raw", *pictures[i].shape[1::-1], at + len(body))
        table.append((i, at + len(body), len(record)))
        body += record
    body += bytes(-len(body) % page)
    header = np.array([(2, len(types), page, rows, at + len(body))], "<u2,<u2,<u4,<u8,<u8")
    described = np.zeros(len(types), "u1,S16,V1024")
    described["f0"] = [number for number, _ in types]
    described["f1"] = [name.encode() for name in given]
    head = header.tobytes() + described.tobytes() + values.tobytes()
    order = draw.permutation(rows)
    path.write_bytes(head + bytes(at - len(head)) + body + np.array(table, "<u8")[order].tobytes())
    return path
