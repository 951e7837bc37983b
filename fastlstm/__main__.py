"""``python -m fastlstm`` is ``fastlstm``."""

import sys

from fastlstm.cli import main

sys.exit(main())
