import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are run from the sources; they are not installed
collect_ignore_glob = [] if (ROOT / "benchmarks").is_dir() else ["test_*.py"]
