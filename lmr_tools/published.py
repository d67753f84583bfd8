"""Published results at x4: PSNR (dB) and SSIM on Y under the `official` protocol, means over the whole test set.

Gathered from the published tables of the methods named; `-rec` was trained with L1 alone. LPIPS of these systems was
not found in print.
"""

from __future__ import annotations

from collections.abc import Mapping

PROTOCOL = "official"
IMAGES: Mapping[str, int] = {"cufed5": 126, "wr-sr": 80, "sun80": 80, "lmr": 142, "urban100": 100, "manga109": 109}

_ORDER = ("cufed5", "wr-sr", "sun80", "lmr", "urban100", "manga109")
_NUMBERS: Mapping[str, str] = {
    "RCAN": "26.06/.769 - 29.86/.810 - 25.42/.768 29.38/.895",
    "RRDB": "26.41/.783 27.96/.793 29.99/.814 29.68/.842 25.98/.788 29.87/.907",
    "ESRGAN": "21.90/.633 26.07/.726 24.18/.651 27.14/.770 20.91/.620 23.53/.797",
    "SwinIR": "26.62/.790 28.06/.797 30.11/.817 29.72/.843 26.26/.797 30.05/.910",
    "SRNTT-rec": "26.24/.784 27.59/.780 28.54/.793 29.58/.854 25.50/.783 28.95/.885",
    "TTSR-rec": "27.09/.804 27.97/.792 30.02/.814 29.13/.832 25.87/.784 30.09/.907",
    "MASA": "24.92/.729 25.76/.717 27.12/.708 27.68/.783 23.78/.712 27.34/.848",
    "MASA-rec": "27.54/.814 28.19/.796 30.15/.815 29.42/.837 26.09/.786 30.28/.909",
    "C2-Matching": "27.16/.805 27.80/.780 29.75/.799 29.25/.833 25.52/.764 29.73/.893",
    "C2-Matching-rec": "28.40/.846 28.32/.801 30.18/.817 30.01/.856 26.03/.785 30.47/.911",
    "DATSR-rec": "28.72/.856 28.34/.805 30.20/.818 30.23/.865 26.52/.798 30.49/.912",
    "RRSR-rec": "28.83/.856 28.41/.804 30.13/.816 30.30/.864 26.21/.790 30.91/.913",
    "MRefSR-rec": "28.94/.860 28.52/.806 30.28/.819 31.81/.895 25.99/.785 30.25/.906",
    "GeoRef-rec (2026)": "29.40/.869 28.67/.810 30.40/.821 31.84/.896 27.01/.813 31.53/.918",
}


def published_results(benchmark: str, protocol: str) -> dict[str, tuple[float, float]]:
    """{system: (PSNR on Y, SSIM on Y)}; empty for other test sets and for another protocol than the published one."""
    if protocol != PROTOCOL or benchmark not in _ORDER:
        return {}
    place = _ORDER.index(benchmark)
    cells = {system: numbers.split()[place] for system, numbers in _NUMBERS.items()}
    pairs = {system: cell.split("/") for system, cell in cells.items() if cell != "-"}
    return {system: (float(psnr), float(ssim)) for system, (psnr, ssim) in pairs.items()}
