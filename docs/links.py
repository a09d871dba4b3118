"""Every address outside that the repository tells people to open: its form, twice the same, hosts that have moved.

`python docs/links.py` prints them one a line, each with where it stands, and ends with 1 where something is wrong;
`make links` hands them to LinkChecker, which asks each whether it is there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
SUFFIXES = {".md", ".py", ".yaml", ".yml", ".toml", ".ipynb"}
# addresses of tests are made up, and of servers that they start
LEFT_OUT = "tests/"
URL = re.compile(r"https?://[^\s\"'<>`\\|{}\[\])]+")
OLD = {
    "www.arxiv.org": "arxiv.org",
    "export.arxiv.org": "arxiv.org",
    "hf.co": "huggingface.co",
    "www.huggingface.co": "huggingface.co",
    "pytorch.org/docs": "docs.pytorch.org",
    "www.github.com": "github.com",
    "pypi.python.org": "pypi.org",
}
"""Names that hosts no longer have."""


def find(root: Path) -> dict[str, list[str]]:
    """Return each address in the files that git has, or would take, with the places that name it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        path = root / name
        if path.suffix not in SUFFIXES or name.startswith(LEFT_OUT) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for match in URL.finditer(line):
                following = line[match.end() : match.end() + 1]
                if following not in ("{", "\\"):  # else it is put together when it is used
                    found[match[0].rstrip(".,;:!?*")].append(f"{name}:{number}")
    return found


def complain(url: str) -> str | None:
    """Return what is wrong with an address as it is written, if something is."""
    parts = urlsplit(url)
    if parts.scheme != "https":
        return "not https"
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc):
        return f"no host '{parts.netloc}'"
    if not re.fullmatch(r"[!-~]+", url) or re.search(r"[<>\"`{}]|[).,;:]$", url):
        return "ends in, or holds, what belongs to the text around it"
    for old, new in OLD.items():
        if f"{parts.netloc}{parts.path}/".startswith(f"{old}/"):
            return f"{old} is {new} now"
    if parts.netloc == "arxiv.org" and not re.fullmatch(r"/abs/\d{2}(0[1-9]|1[0-2])\.\d{4,5}", parts.path):
        return "not of the form arxiv.org/abs/YYMM.NNNNN"
    if parts.netloc == "github.com" and not re.match(r"/[\w-]+/[\w.-]+(/|$)", parts.path):
        return "names no repository"
    return None


def main() -> int:
    """Print the addresses on stdout, and what is wrong with them on stderr."""
    found = find(ROOT)
    wrong = [f"{places[0]}: {url}: {words}" for url, places in found.items() if (words := complain(url))]
    canonical: dict[str, set[str]] = defaultdict(set)
    for url in found:
        canonical[url.lower().rstrip("/").removesuffix(".git")].add(url)
    wrong += [
        f"the same address in two forms: {', '.join(sorted(urls))}" for urls in canonical.values() if len(urls) > 1
    ]
    for url, places in sorted(found.items()):
        print(f"{url}  {places[0]}" + (f" and {len(places) - 1} more" if len(places) > 1 else ""))
    print(*wrong, f"{len(found)} addresses, {len(wrong)} wrong", sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
