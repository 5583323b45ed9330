"""python -m page [--model DIR]: draw arrows in the browser, press Dream, watch. Ctrl+C ends it."""

from page.server import main

main()
