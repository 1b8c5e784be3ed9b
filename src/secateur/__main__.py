"""``python -m secateur``."""

from secateur.cli import main

raise SystemExit(main())
