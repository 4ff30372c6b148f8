"""The checks of what tests leave behind, and of tests that hang, can fail."""

import re
import subprocess
import sys
from pathlib import Path

from tests import harness

LEAVES = {
    "process": "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)",
    "tests.zygote": "subprocess.Popen(['sh', '-c', 'sleep 60; :', 'tests.zygote'], start_new_session=True)",
    "/dev/shm/distloop_left": "open('/dev/shm/distloop_left', 'w').close()",
    "file_of_a_test": "import os; open(os.environ['DISTLOOP_TEST_TEMP'] + '/file_of_a_test', 'w').close()",
}
# Without the seconds in which what is ending may end.
PYTEST = (
    "import sys, pytest; from tests import leftovers; leftovers.GONE_SECS = .5; sys.exit(pytest.main(sys.argv[1:]))"
)


def session(folder, *flags):
    flags = ("-p", "tests.leftovers", "-p", "no:cacheprovider", f"--basetemp={folder / 'temp'}", *flags)
    command = [sys.executable, "-c", PYTEST, *flags, str(folder)]
    environment = harness.environment_of_tests()
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=120)


def test_a_session_that_leaves_something_behind_fails_and_says_what(tmp_path):
    body = "\n    ".join(LEAVES.values())
    (tmp_path / "test_one.py").write_text(f"def test_one():\n    {body}\n")
    done = session(tmp_path)
    Path("/dev/shm/distloop_left").unlink()
    assert done.returncode == 1
    assert "1 passed" in done.stdout
    for what in LEAVES:
        assert what in done.stdout.partition("LEFT BEHIND")[2]


def test_a_test_that_hangs_ends_the_session_with_its_name_and_its_stack(tmp_path, pytestconfig):
    assert float(pytestconfig.getini("faulthandler_timeout")) > 0
    assert pytestconfig.getini("faulthandler_exit_on_timeout")
    (tmp_path / "test_one.py").write_text("import time\ndef stuck(): time.sleep(600)\ndef test_hangs(): stuck()\n")
    limit = ("-ofaulthandler_timeout=1", "-ofaulthandler_exit_on_timeout=true", "-omarkers=slow")
    done = session(tmp_path, *pytestconfig.getini("addopts"), "-n1", *limit)
    assert done.returncode != 0
    assert "1 failed" in done.stdout, done.stdout
    assert re.search(r"worker 'gw0' crashed while running '.*test_one.py::test_hangs'", done.stdout)
    assert re.search(r"^Timeout [^$]* in stuck\n.* in test_hangs\n", done.stderr)
    assert done.stderr.count("Timeout ") == 1
