from matplotlib import pyplot as plt


def assert_nothing_is_cut_off(figure):
    """Draw a figure, check that titles, axis labels and legends lie within it, and close it."""
    figure.canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend().get_texts() if axes.get_legend() else []
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *legend):
            box = text.get_window_extent()
            inside = (
                box.x0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.height + 1
            )
            assert inside or not text.get_text(), text.get_text()
    plt.close(figure)
