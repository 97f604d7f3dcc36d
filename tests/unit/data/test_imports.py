"""Import time of the data package."""

import subprocess
import sys


def test_data_modules_import_neither_torch_nor_pyarrow():
    code = (
        "import sys, coprs_deploy.data.contact_sheet, coprs_deploy.data.sources; "
        "assert not {'torch', 'pyarrow', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
