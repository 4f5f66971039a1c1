"""``lightning-curvature report``."""

from collections.abc import Sequence


def report(dirs: Sequence[str], out: str | None = None, prefix: str = "curvature") -> None:
    """Write a report of logged runs: report.html, which holds all it shows, and its pictures.

    Args:
        dirs: folders that CSVLogger or TensorBoardLogger has written, or folders above them
        out: folder of the report; default: report in the first of the folders
        prefix: prefix of the monitors
    """
    from lightning_curvature.report.page import write_report

    print(write_report(dirs, out, prefix))
