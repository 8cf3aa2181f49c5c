"""How the lines of a list file are laid out."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pipeline.data.sources.files import IMAGE_EXTENSIONS, extension

PATH_COLUMNS: Final = ("path", "image", "file", "filename", "file_name", "image_path", "file_path")
LABEL_COLUMNS: Final = ("label", "identity", "class", "cls", "target")
# Mostly the number of the row: says who it is only where nothing else does.
WEAK_LABEL_COLUMNS: Final = ("id",)
EXPECTED: Final = (
    "'path label', '1<TAB>path<TAB>label' (insightface) or 'index<TAB>label<TAB>path' (im2rec), parted by tabs, commas "
    "or blanks; or a first line that names the columns, a path and a label among them"
)

_NUMBER: Final = re.compile(r"[0-9]+(\.0*)?")
_SEPARATORS: Final = {"\t": "<TAB>", ",": ",", "": " "}  # "": runs of blanks


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A layout of lines.

    Attributes:
        separator: A tab, a comma, or "" for runs of blanks.
        columns: Of every line: ``path``, ``label``, ``1``, ``index`` or, with a header, names that are not used.
        path: Which column is the path.
        label: Which column is the label.
        has_header: Whether the first line names the columns.
    """

    separator: str
    columns: tuple[str, ...]
    path: int
    label: int
    has_header: bool = False

    @property
    def expected(self) -> str:
        """The layout in words."""
        return repr(_SEPARATORS[self.separator].join(self.columns))

    def read(self, line: str) -> tuple[str, str]:
        """The path and the label of a line.

        Raises:
            ValueError: It is laid out in another way.
        """
        fields = split(line, self.separator)
        if len(fields) != len(self.columns):
            blanks = "" if self.separator else " (paths with blanks need tabs or commas)"
            raise ValueError(f"{len(fields)} fields, {len(self.columns)} are expected{blanks}")
        path, label = fields[self.path], fields[self.label]
        if extension(path) not in IMAGE_EXTENSIONS:
            raise ValueError(f"{path!r} is no path of an image ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        if not label:
            raise ValueError("it has no label")
        if len(self.columns) == 3 and not self.has_header:
            self._check_packs(fields)
        return path, label

    def _check_packs(self, fields: Sequence[str]) -> None:
        if self.columns[0] == "1" and fields[0] != "1":
            raise ValueError(f"it starts with {fields[0]!r}; 1 says that the face is aligned")
        if not _NUMBER.fullmatch(fields[0]):
            raise ValueError(f"{fields[0]!r} is not an index")
        if not _NUMBER.fullmatch(fields[self.label]):
            raise ValueError(f"{fields[self.label]!r} is not a class number")


def split(line: str, separator: str) -> list[str]:
    """The fields of a line, without blanks around them; quotes count where commas part the fields.

    Raises:
        ValueError: A quote is not closed.
    """
    if not separator:
        return line.split()
    if separator == "," and '"' in line:
        try:
            fields = next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise ValueError(str(error)) from error
    else:
        fields = line.split(separator)
    return [field.strip() for field in fields]


def find_form(lines: Sequence[str]) -> Form | None:
    """The form that fits all of some first lines, else the first of them; None: no form fits that.

    Raises:
        ValueError: The first line names columns, but not one path and one label.
    """
    for separator in _SEPARATORS:
        form = _from_header(lines[0], separator)
        if form is not None:
            return form
    forms = [
        Form(separator=separator, columns=columns, path=columns.index("path"), label=columns.index("label"))
        for separator in _SEPARATORS
        for columns in (("path", "label"), ("1", "path", "label"), ("index", "label", "path"))
    ]
    fitting = [form for form in forms if _fits(form, lines[0])]
    for form in fitting:
        if all(_fits(form, line) for line in lines):
            return form
    return fitting[0] if fitting else None


def _fits(form: Form, line: str) -> bool:
    try:
        form.read(line)
    except ValueError:
        return False
    return True


def _from_header(line: str, separator: str) -> Form | None:
    try:
        columns = tuple(name.lower() for name in split(line, separator))
    except ValueError:
        return None
    paths = [place for place, name in enumerate(columns) if name in PATH_COLUMNS]
    labels = [place for place, name in enumerate(columns) if name in LABEL_COLUMNS]
    labels = labels or [place for place, name in enumerate(columns) if name in WEAK_LABEL_COLUMNS]
    if not paths or not labels:
        return None
    if len(paths) > 1 or len(labels) > 1:
        raise ValueError(
            f"the columns {', '.join(columns)} leave open which is the path ({', '.join(PATH_COLUMNS)}) and which the "
            f"label ({', '.join(LABEL_COLUMNS)})"
        )
    return Form(separator=separator, columns=columns, path=paths[0], label=labels[0], has_header=True)
