"""Makes train.csv.gz, validation.csv.gz and sample.json from scikit-learn's copy of the digits.

    python3 -m venv /tmp/digits && /tmp/digits/bin/pip install --no-deps scikit-learn==1.9.1
    python3 prepare.py /tmp/digits/lib/python3*/site-packages/sklearn/datasets/data/digits.csv.gz

The output is the same byte for byte on every run: the split is drawn by a fixed seed, class by
class, from a hash written out here, and the archives carry no time. Needs nothing but Python.
"""

import gzip
import hashlib
import json
import os
import sys

SEED = b"cohort digits 1"
VALIDATION_SHARE = 5  # one in five of every class


def rank(row):
    """A place in a shuffled order that depends on the row's number alone."""
    return hashlib.sha256(SEED + row.to_bytes(4, "big")).digest()


def write(name, images):
    header = ",".join([f"p{i}" for i in range(64)] + ["label"])
    text = "\n".join([header] + [",".join(map(str, image)) for image in images]) + "\n"
    with open(name, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as archive:
        archive.write(text.encode())
    print(f"{name}: {len(images)} images, {os.path.getsize(name)} bytes")


def main():
    with gzip.open(sys.argv[1], "rt") as file:
        images = [[int(float(cell)) for cell in line.split(",")] for line in file]
    assert len(images) == 1797 and all(len(image) == 65 for image in images)
    assert all(0 <= pixel <= 16 for image in images for pixel in image[:64])

    train, validation = [], []
    for digit in range(10):
        rows = [row for row, image in enumerate(images) if image[64] == digit]
        rows.sort(key=rank)
        held_out = len(rows) // VALIDATION_SHARE
        validation += rows[:held_out]
        train += rows[held_out:]
    train.sort(key=rank)
    validation.sort(key=rank)

    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    write("train.csv.gz", [images[row] for row in train])
    write("validation.csv.gz", [images[row] for row in validation])
    sample = images[validation[0]]
    with open("sample.json", "w") as file:
        file.write(json.dumps({"pixels": sample[:64]}) + "\n")
    print(f"sample.json: a {sample[64]}")


main()
