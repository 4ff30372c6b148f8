"""The check of what tests leave behind can fail."""

import subprocess
import sys
from pathlib import Path

from tests import harness

LEAVES = {
    "process": "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)",
    "/dev/shm/distloop_left": "open('/dev/shm/distloop_left', 'w').close()",
    "file_of_a_test": "import os; open(os.environ['DISTLOOP_TEST_TEMP'] + '/file_of_a_test', 'w').close()",
}


def test_a_session_that_leaves_something_behind_fails_and_says_what(tmp_path):
    body = "\n    ".join(LEAVES.values())
    (tmp_path / "test_one.py").write_text(f"def test_one():\n    {body}\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.leftovers", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=harness.environment_of_tests())
    Path("/dev/shm/distloop_left").unlink()
    assert done.returncode == 1
    assert "1 passed" in done.stdout
    for what in LEAVES:
        assert what in done.stdout.partition("LEFT BEHIND")[2]
