/* The least that decoding can cost: libjpeg-turbo on one region of a JPEG in memory, in one thread.
 * cc -O2 -shared -fPIC -o decode_floor.so decode_floor.c -ljpeg */
#include <stdio.h>
#include <time.h>

#include <jpeglib.h>

/* Decodes rows top .. bottom-1 and about columns left .. right-1 into `out`; returns the thread's CPU seconds. */
double decode_region(const unsigned char *data, unsigned long size, int left, int top, int right, int bottom,
                     unsigned char *out) {
    struct timespec before, after;
    struct jpeg_decompress_struct image;
    struct jpeg_error_mgr errors;
    JDIMENSION first = left, width = right - left;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
    image.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&image);
    jpeg_mem_src(&image, data, size);
    jpeg_read_header(&image, TRUE);
    image.out_color_space = JCS_RGB;
    jpeg_start_decompress(&image);
    jpeg_crop_scanline(&image, &first, &width);
    if (top)
        jpeg_skip_scanlines(&image, top);
    while ((int)image.output_scanline < bottom) {
        JSAMPROW row = out + (image.output_scanline - top) * (size_t)width * 3;
        jpeg_read_scanlines(&image, &row, 1);
    }
    jpeg_destroy_decompress(&image);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    return (after.tv_sec - before.tv_sec) + (after.tv_nsec - before.tv_nsec) * 1e-9;
}
