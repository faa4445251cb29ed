"""What the build of the site needs beside Sphinx: formulas without scripts, links, the poster."""
