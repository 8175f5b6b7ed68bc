/* Set-user-ID root in its image: says which user it runs as. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
    return printf("Effective uid: %d\n", (int)geteuid()) < 0;
}
