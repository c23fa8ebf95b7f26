"""One self-contained page that shows what a run did. `page` draws it, and imports matplotlib to do so; `extras` keeps what it shows."""
