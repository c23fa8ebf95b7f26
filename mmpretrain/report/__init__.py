"""The report of a run, as one self-contained HTML page. `page` renders it, with matplotlib; `extras` stores its tables and figures."""
