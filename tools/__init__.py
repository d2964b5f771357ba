"""Programs for the maintainers of deepspec; none of them is in the wheel."""
