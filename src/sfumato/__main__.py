"""`python -m sfumato`, for launchers such as torchrun."""

from sfumato.cli import main

main()
